"""Where an encoder's inputs come from: images and tokens, hidden states, or features."""
from typing import Protocol

import numpy as np
import torch


class ItemSource(Protocol):
    """Inputs of all items by item number.

    Attributes:
        num_items: items are 1..num_items.
    """

    num_items: int

    def fetch(self, items: np.ndarray, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Inputs of some items (numbers from 1) on a device, one row an item."""

    def reading_order(self) -> np.ndarray:
        """All items, in the order in which encoding them in batches is cheapest."""

    def place_on(self, device: torch.device) -> None:
        """Keep on the device what fits there."""
