"""One pass of a frozen foundation model over all items, which hidden states and frozen features are made of."""
from collections.abc import Iterator

import torch
from tqdm import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from models.clip_peft import channel_statistics
from models.item_encoder import MODALITIES
from utils.items.store import ImageTitleStore


def model_inputs(
    store: ImageTitleStore,
    processor: BaseImageProcessor | None,
    device: torch.device,
    description: str,
    items_at_once: int,
    modality: str = "both",
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor | None]]]:
    """What a foundation model reads of all items, in the order in which encoding them is cheapest.

    Args:
        store: the items' images and titles.
        processor: the model's image processor.
        device: where the model lies.
        description: of the progress bar.
        items_at_once: items a forward pass.
        modality: "both", "image" or "text"; None stands for what is not used.
    Yields:
        rows (item - 1, on the CPU) [items], normalised images [items, 3, height, width], tokens and, where the model takes
        one, mask [items, length] each
    """
    scale, shift = (statistic.to(device) for statistic in channel_statistics(processor))
    order, used = store.reading_order(), MODALITIES[modality]
    for start in tqdm(range(0, len(order), items_at_once), description, unit="batch", disable=None):
        items = order[start : start + items_at_once]
        pixels, *titles = store.fetch(items, device)
        images = torch.addcmul(shift, pixels.float(), scale) if "image" in used else None
        yield torch.from_numpy(items - 1), images, titles if "text" in used else [None]
