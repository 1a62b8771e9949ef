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


def fits_on(device: torch.device, *arrays: np.ndarray | torch.Tensor) -> bool:
    """Whether a device is a GPU on which arrays take no more than 40% of the free memory."""
    return device.type == "cuda" and sum(array.nbytes for array in arrays) <= 0.4 * torch.cuda.mem_get_info(device)[0]


class FeatureStore:
    """Tensors of all items that were computed before: features of the frozen baseline, or hidden states.

    Args:
        tensors: [rows, ...] each, float32 or float16, possibly memory-mapped.
        rows: where item i + 1 lies in them, [num_items]; row i by default.
    """

    def __init__(self, *tensors: torch.Tensor, rows: np.ndarray | None = None):
        rows = np.arange(len(tensors[0])) if rows is None else rows
        self.tensors = tensors
        self._rows = torch.from_numpy(rows)
        self._order = np.argsort(rows, kind="stable") + 1
        self.num_items = len(rows)

    def place_on(self, device: torch.device) -> None:
        """Keep all on a GPU if they fit there with room to spare; elsewhere they stay where they are."""
        if fits_on(device, *self.tensors):
            self.tensors, self._rows = tuple(tensor.to(device) for tensor in self.tensors), self._rows.to(device)

    def fetch(self, items: np.ndarray, device: torch.device) -> tuple[torch.Tensor, ...]:
        """What the tensors hold of some items (numbers from 1), [items, ...] each, float32."""
        rows = self._rows[to_device(items - 1, self._rows.device)]
        return tuple(to_device(tensor.index_select(0, rows), device).float() for tensor in self.tensors)

    def reading_order(self) -> np.ndarray:
        """All items, in the order of their rows."""
        return self._order
