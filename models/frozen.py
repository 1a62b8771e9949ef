"""A foundation model's features as they are: the baselines without an adapter."""
import torch
from torch import nn

from models.item_encoder import ItemEncoder


class FrozenEncoder(ItemEncoder):
    """Passes on features that were computed once; there is nothing to train, to clone or to save.

    Args:
        feature_dim: width of the features; 0 where items are known by their embeddings alone.
        foundation_parameters: parameters of the model that they come from; None where there is none.
    """

    def __init__(self, feature_dim: int, foundation_parameters: int | None = None):
        super().__init__()
        self.feature_dim = feature_dim
        self.foundation_parameters = foundation_parameters
        self._num_groups = 1

    @property
    def num_groups(self) -> int:
        """How many groups there are, all served alike."""
        return self._num_groups

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The features as they came, [items, feature_dim]."""
        return features

    def clone_groups(self, num_groups: int) -> None:
        """Serve so many groups from now on."""
        self._num_groups = num_groups

    def use_group(self, group: int) -> None:
        """Nothing differs between groups."""

    def group_parameters(self, group: int) -> dict[str, nn.Parameter]:
        """None are trained."""
        return {}

    def group_state(self, group: int) -> dict[str, torch.Tensor]:
        """Nothing needs to be saved."""
        return {}

    def load_group_state(self, group: int, state: dict[str, torch.Tensor]) -> None:
        """There is nothing to load."""
