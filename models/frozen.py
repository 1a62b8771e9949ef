"""A foundation model's features as they are: the baselines without an adapter."""
import torch
from torch import nn

from models.item_encoder import ItemEncoder


class FrozenEncoder(ItemEncoder):
    """Passes on features that were computed once; there is nothing to train or to save, and all groups are served alike.

    Args:
        feature_dim: width of the features; 0 where items are known by their embeddings alone.
        foundation_parameters: parameters of the model that they come from; None where there is none.
    """

    def __init__(self, feature_dim: int, foundation_parameters: int | None = None):
        super().__init__(nn.Identity())
        self.feature_dim = feature_dim
        self.foundation_parameters = foundation_parameters

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The features unchanged, [items, feature_dim]."""
        return features
