"""Where an encoder's inputs come from: images and tokens, hidden states, or features."""
from typing import Protocol

import numpy as np
import torch

from utils.common.devices import to_device


class ItemSource(Protocol):
    """Inputs of all items, 1..num_items."""

    num_items: int

    def fetch(self, items: np.ndarray, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Inputs of some items (numbers from 1) on a device, one row an item."""

    def reading_order(self) -> np.ndarray:
        """All items, in the order in which encoding them in batches is cheapest."""

    def place_on(self, device: torch.device) -> None:
        """Keep on the device what fits there."""


class FeatureStore:
    """Features computed before, row i of item i + 1, [items, width]: what the frozen baseline reads."""

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
