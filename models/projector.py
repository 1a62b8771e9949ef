"""The projector: a foundation model's item features to the recommender's width."""
from torch import Tensor, nn


class MMProjector(nn.Module):
    """Linear, LayerNorm, ReLU, Linear, LayerNorm (PerPEFT, WWW 2026, the multimodal projector), `hidden_units` wide.

    `in_dim` is 1024 for CLIP ViT-B/32's image and title embeddings side by side.
    """

    def __init__(self, in_dim: int, hidden_units: int = 32):
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(in_dim, 2 * hidden_units),
            nn.LayerNorm(2 * hidden_units, eps=1e-8),
            nn.ReLU(),
            nn.Linear(2 * hidden_units, hidden_units),
        )
        self.last_layernorm = nn.LayerNorm(hidden_units, eps=1e-8)

    def forward(self, features: Tensor) -> Tensor:
        """Project item features, [items, in_dim] -> [items, hidden_units]."""
        return self.last_layernorm(self.projector(features))


class NoProjector(nn.Module):
    """In the projector's place where items are known by their embeddings alone: every multimodal vector is zero."""

    def __init__(self, in_dim: int, hidden_units: int):
        super().__init__()
        self.hidden_units = hidden_units

    def forward(self, features: Tensor) -> Tensor:
        """[items, any width] -> zeros [items, hidden_units]."""
        return features.new_zeros(len(features), self.hidden_units)
