"""The plain ways of doing what the project does faster, for the benchmark and for tests of equality."""
import numpy as np
import torch
from torch import nn

from utils.data.histories import Histories


class PlainIISAN(nn.Module):
    """IISAN written out layer by layer, without batching; arguments and shapes as in `IISAN`."""

    def __init__(self, image_dim: int, text_dim: int, num_states: int, bottleneck: int = 32):
        super().__init__()

        def block(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, bottleneck), nn.GELU(), nn.Linear(bottleneck, width))

        self.gates = nn.Parameter(torch.zeros(3, num_states))
        self.image, self.text, self.inter = (
            nn.ModuleList(block(width) for _ in range(num_states)) for width in (image_dim, text_dim, text_dim)
        )
        self.combine = nn.ModuleList(nn.Linear(image_dim, text_dim) for _ in range(num_states))

    def forward(self, image_states: torch.Tensor, text_states: torch.Tensor) -> torch.Tensor:
        """The plain forward pass."""
        w = torch.sigmoid(self.gates)
        for i in range(len(self.image)):
            t, v = text_states[:, i], image_states[:, i]  # [items, width]
            both = w[2, i] * t + (1 - w[2, i]) * self.combine[i](v)
            if i == 0:
                text, image, joint = t, v, both
            else:
                text, image, joint = w[0, i] * text + (1 - w[0, i]) * t, w[1, i] * image + (1 - w[1, i]) * v, joint + both
            text, image, joint = self.text[i](text) + text, self.image[i](image) + image, self.inter[i](joint) + joint
        return torch.cat([text, image, joint], dim=-1)


def plain_ranking_loop(
    states: torch.Tensor, inputs: torch.Tensor, targets: np.ndarray, excluded: Histories, users: np.ndarray
) -> np.ndarray:
    """`rank_targets` a user at a time: candidates listed, then scored."""
    ranks = []
    for place, user in enumerate(users):
        target = int(targets[place])
        seen = {target, *excluded[user].tolist()}
        candidates = [target, *(item for item in range(1, len(inputs)) if item not in seen)]
        scores = inputs[torch.tensor(candidates)] @ states[place]  # [candidates]
        ranks.append(int((scores[1:] >= scores[0]).sum()))
    return np.array(ranks)
