"""CLIP's features of all items, computed at every start and kept in memory: what the frozen baseline reads."""
import numpy as np
import torch
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

from models.towers import dual_features
from utils.common.devices import to_device
from utils.items.passes import model_inputs
from utils.items.store import ImageTitleStore


class FeatureStore:
    """Features of all items by item number.

    Args:
        features: row i of item i + 1, [items, width]; a width of 0 for items without any.
    """

    def __init__(self, features: torch.Tensor):
        self.features = features
        self.num_items = len(features)

    def place_on(self, device: torch.device) -> None:
        """Keep the features on a GPU, where they take little room."""
        self.features = self.features.to(device)

    def fetch(self, items: np.ndarray, device: torch.device) -> tuple[torch.Tensor]:
        """Features of some items (numbers from 1), [items, width]."""
        rows = to_device(items - 1, self.features.device)
        return (to_device(self.features.index_select(0, rows), device),)

    def reading_order(self) -> np.ndarray:
        """All items."""
        return np.arange(1, self.num_items + 1)


@torch.no_grad()
def compute_features(
    clip: nn.Module,
    processor: BaseImageProcessor | None,
    store: ImageTitleStore,
    modality: str,
    device: torch.device,
    items_at_once: int = 64,
) -> torch.Tensor:
    """CLIP's own features of all items, row i of item i + 1, on the CPU.

    Args:
        clip, processor: the foundation model and its image processor.
        store: the items' images and titles.
        modality: "both", "image" or "text".
        device: where to compute.
        items_at_once: items a forward pass.
    Returns:
        [items, width of the features]
    """
    clip = clip.eval().to(device)
    inputs = model_inputs(store, processor, device, "frozen features", items_at_once, modality)
    passes = [(rows, dual_features(clip, images, *titles).cpu()) for rows, images, titles in inputs]
    features = torch.empty(store.num_items, passes[0][1].shape[1])
    for rows, found in passes:
        features[rows] = found
    return features
