"""The interface between the training pipeline and any foundation model with adapters."""
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from peft import PeftConfig
from torch import nn

MODALITIES = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}  # which parts of an item are used


class ItemEncoder(nn.Module, ABC):
    """Turns what an item source fetches (images and tokens, or hidden states) into item features, by one of its adapters.

    A new encoder has one adapter, group 0, which is the global one. `clone_groups(C)` makes C equal adapters of it, which
    then train apart. Only the adapter chosen by `use_group` takes part in a forward pass, so only it receives gradients; the
    others keep `grad = None`, and AdamW leaves them as they are.

    Implementations: `ClipPeftEncoder` (LoRA, IA3, other peft tuners), `IISANEncoder`, and for comparison `FrozenEncoder`,
    which has nothing to train.
    """

    #: width of an item's features
    feature_dim: int
    #: parameters of the whole foundation model, of which the adapters are a share; None where that is not known
    foundation_parameters: int | None
    #: of adapters that peft can open; None for others, whose state is saved as a state_dict in `state_file`
    adapter_config: PeftConfig | None = None
    state_file: str = "adapter.pth"

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
    def group_state(self, group: int) -> dict[str, torch.Tensor]:
        """All that must be saved of one group's adapter, by name, on the CPU."""

    @abstractmethod
    def load_group_state(self, group: int, state: dict[str, torch.Tensor]) -> None:
        """Replace one group's adapter by a `group_state`.

        Raises:
            ValueError: it does not fit.
        """

    @property
    @abstractmethod
    def num_groups(self) -> int:
        """How many adapters there are."""

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of all groups."""
        for group in range(self.num_groups):
            yield from self.group_parameters(group).values()
