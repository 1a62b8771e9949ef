"""Foundation models with what prepares their inputs: loaded, tried, and run once over all items."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from models.clip_peft import channel_statistics
from models.item_encoder import MODALITIES
from models.pair import EncoderPair
from models.towers import Traits, dual_features, hidden_states
from utils.common.errors import PerPEFTError, first_line
from utils.common.files import build_once
from utils.data.dataset import Dataset
from utils.items.hidden_states import has_states, save_hidden_states, states_path
from utils.items.model_files import FoundationName, load_parts, quiet_transformers
from utils.items.store import ImageTitleStore
from utils.items.trial import find_traits

ITEMS_AT_ONCE = 64  # in a pass over all items


@dataclass
class Foundation:
    """A dual encoder, or a pair of encoders, with the processors that prepare its inputs; None for images that it lacks."""

    clip: PreTrainedModel | EncoderPair
    image_processor: BaseImageProcessor | None
    tokenizer: PreTrainedTokenizerBase
    traits: Traits
    name: str = ""

    def store(self, dataset: Dataset, missing_images: str = "error") -> ImageTitleStore:
        """A data set's images and titles as this model reads them; images are left out if `missing_images` is "unused"."""
        processor = None if missing_images == "unused" else self.image_processor
        return ImageTitleStore.open(dataset, processor, self.tokenizer, self.traits, missing_images)

    def features(self, store: ImageTitleStore, device: torch.device, modality: str = "both") -> torch.Tensor:
        """The frozen model's own features of all items, row i of item i + 1, on the CPU, [items, feature width]."""
        return self._tables("frozen features", lambda *inputs: [dual_features(self.clip, *inputs)], store, device, modality)[0]

    def hidden_states(self, store: ImageTitleStore, device: torch.device, modality: str = "both") -> tuple[torch.Tensor, ...]:
        """The frozen model's states of all items for IISAN, row i of item i + 1, on the CPU.

        Returns:
            image states [items, S, image width], title states [items, S, text width]; a width of 0 for what is not used
        Raises:
            PerPEFTError: the model has none that IISAN can use.
        """
        try:
            return tuple(self._tables("hidden states", partial(hidden_states, self.clip, self.traits), store, device, modality))
        except ValueError as error:
            raise PerPEFTError(f"'{self.name}' cannot be used: {first_line(error)}") from error

    @torch.no_grad()
    def _tables(
        self, description: str, compute: Callable[..., Sequence], store: ImageTitleStore, device: torch.device, modality: str
    ) -> list[torch.Tensor]:
        """Tables of all items, on the CPU, of what is computed of batches of similar title length.

        `compute` takes images, tokens and, where the model reads one, a mask, as in `dual_features`; the bar is `description`.
        """
        self.clip.eval().to(device)
        scale, shift = (statistic.to(device) for statistic in channel_statistics(self.image_processor))
        order, used = store.reading_order(), MODALITIES[modality]
        tables: list[torch.Tensor] = []
        for start in tqdm(range(0, len(order), ITEMS_AT_ONCE), description, unit="batch", disable=None):
            items = order[start : start + ITEMS_AT_ONCE]
            pixels, *titles = store.fetch(items, device)
            images = torch.addcmul(shift, pixels.float(), scale) if "image" in used else None
            found = compute(images, *(titles if "text" in used else [None]))
            tables = tables or [torch.empty(store.num_items, *part.shape[1:]) for part in found]
            for table, part in zip(tables, found):
                table[torch.from_numpy(items - 1)] = part.cpu()
        return tables


def load_foundation(name: FoundationName, attention: str | None = None) -> Foundation:
    """Load a dual encoder, or a pair of encoders, and the processors from folders or the model hub.

    Args:
        name: a folder as `save_pretrained` writes it, or a name on the hub; or those of a pair.
        attention: transformers' name of how it is computed, "eager" where its weights are needed (default: the fastest).
    Raises:
        PerPEFTError: it is neither, of another kind, its parts do not fit together, or it needs more than an image and a title.
    """
    parts = load_parts(name, attention)
    try:
        with quiet_transformers():
            return Foundation(*parts, find_traits(*parts), str(name))
    except Exception as error:  # each model has its own ways to refuse inputs
        if attention == "eager":
            raise PerPEFTError(f"'{name}' cannot be used: {first_line(error)}") from error
    return load_foundation(name, "eager")  # a faster one may drop masks that it thinks needless, as AIMv2's does


def ensure_hidden_states(
    dataset: Dataset, name: FoundationName, device: torch.device, missing_images: str = "error", modality: str = "both",
    recompute: bool = False,
) -> Path:  # fmt: skip
    """The path of a data set's hidden states, which are computed first if they are not there, or in any case if `recompute`."""
    path = states_path(dataset.folder, dataset.name)
    with build_once(path, lambda: not recompute and has_states(dataset.folder, dataset.name, modality)) as missing:
        if missing:
            foundation = load_foundation(name)
            states = foundation.hidden_states(foundation.store(dataset, missing_images), device, modality)
            save_hidden_states(path, *states, dataset.raw_ids, name)
    return path
