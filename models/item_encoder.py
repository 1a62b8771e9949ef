"""The interface between the training pipeline and any foundation model with adapters."""
import copy

from peft import PeftConfig
from torch import Tensor, nn

MODALITIES = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}  # which parts of an item are used


class ItemEncoder(nn.Module):
    """Turns what an item source fetches (images and tokens, or hidden states) into item features, by one of its adapters.

    A new encoder has one adapter, group 0, which is the global one. `clone_groups(C)` makes C equal adapters of it, which
    then train apart. Only the adapter chosen by `use_group` takes part in a forward pass, so only it receives gradients; the
    others keep `grad = None`, and AdamW leaves them as they are.

    Args:
        adapter: the global one, a module that turns inputs into features; None where a subclass adds its own form of it.
        feature_dim: width of an item's features.
        foundation_parameters: of the whole foundation model, of which the adapters are a share; None where that is not known.
    Attributes:
        adapter_config: of adapters that peft can open; None for others, whose state is saved as a state_dict in `state_file`.
    """

    adapter_config: PeftConfig | None = None
    state_file: str

    def __init__(self, adapter: nn.Module | None, feature_dim: int, foundation_parameters: int | None):
        super().__init__()
        self.feature_dim, self.foundation_parameters = feature_dim, foundation_parameters
        self._groups = nn.ModuleList([] if adapter is None else [adapter])
        self._active = 0

    def forward(self, *inputs: Tensor) -> Tensor:
        """Features of the items whose inputs were fetched, [items, feature_dim], by the adapter that acts."""
        return self._groups[self._active](*inputs)

    @property
    def num_groups(self) -> int:
        """How many adapters there are."""
        return len(self._groups)

    def clone_groups(self, num_groups: int) -> None:
        """Make `num_groups` adapters, every one a copy of the present group 0."""
        self.use_group(0)
        copies = [copy.deepcopy(self._groups[0]) for _ in range(num_groups - 1)]
        self._groups = nn.ModuleList([self._groups[0], *copies]).train(self.training)  # keeps its place in parameters()

    def use_group(self, group: int) -> None:
        """Let group `group`'s adapter act from now on."""
        self._active = group

    def group_parameters(self, group: int) -> dict[str, nn.Parameter]:
        """The trainable parameters of one group's adapter, by a name that is the same in every group."""
        return dict(self._groups[group].named_parameters())

    def group_state(self, group: int) -> dict[str, Tensor]:
        """All that must be saved of one group's adapter, by name, on the CPU."""
        return {name: tensor.cpu() for name, tensor in self._groups[group].state_dict().items()}

    def load_group_state(self, group: int, state: dict[str, Tensor]) -> None:
        """Replace one group's adapter by a `group_state`; raises a ValueError if it does not fit."""
        try:
            self._groups[group].load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(str(error)) from error


class FrozenEncoder(ItemEncoder):
    """Passes on a foundation model's features, computed once; of width 0 where items are known by their embeddings alone."""

    def __init__(self, feature_dim: int, foundation_parameters: int | None = None):
        super().__init__(nn.Identity(), feature_dim, foundation_parameters)
