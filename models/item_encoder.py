"""The interface between the training pipeline and any foundation model with adapters."""
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

MODALITIES = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}  # what of an item an encoder looks at


class ItemEncoder(nn.Module, ABC):
    """Turns what an item source fetches (images and tokens, or hidden states) into item features, by one of its adapters.

    An encoder is born with one adapter, group 0, which is the global one. `clone_groups(C)` makes C adapters of it, all
    alike, which then train apart. Only the adapter chosen by `use_group` takes part in a forward pass, so only it receives
    gradients; the others keep `grad = None`, and AdamW leaves them as they are.

    Implementations: `ClipPeftEncoder` (LoRA, IA3), `IISANEncoder`, and for comparison `FrozenEncoder`, which has nothing to
    train. A new kind of adapter is one more.
    """

    #: width of an item's features
    feature_dim: int
    #: parameters of the whole foundation model, of which the adapters are a share; None where that is not known
    foundation_parameters: int | None

    @abstractmethod
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Features of the items whose inputs were fetched, [items, feature_dim]."""

    @abstractmethod
    def clone_groups(self, num_groups: int) -> None:
        """Make `num_groups` adapters, every one a copy of the present group 0."""

    @abstractmethod
    def use_group(self, group: int) -> None:
        """Let group `group`'s adapter act from now on."""

    @abstractmethod
    def group_parameters(self, group: int) -> dict[str, nn.Parameter]:
        """The trainable parameters of one group's adapter, by a name that is the same in every group."""

    @abstractmethod
    def save_group(self, folder: Path, group: int) -> None:
        """Write one group's adapter into `folder`, in a form that opens without this project."""

    @abstractmethod
    def load_group(self, folder: Path, group: int) -> None:
        """Read what `save_group` wrote into group `group`'s adapter."""

    @property
    @abstractmethod
    def num_groups(self) -> int:
        """How many adapters there are."""

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of all groups."""
        for group in range(self.num_groups):
            yield from self.group_parameters(group).values()
