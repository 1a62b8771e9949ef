"""PerPEFT: one sequential recommender, with an adapter and a projector for every user group."""
import copy

import torch
import torch.nn.functional as F
from torch import nn

from models.item_encoder import ItemEncoder
from models.projector import MMProjector
from models.sasrec import SASRec


class PerPEFT(nn.Module):
    """The whole model. With one group it is stage 1's global PEFT; with C groups it is stage 3's personalized PEFT.

    Args:
        encoder: the foundation model with one adapter a group.
        projector: the global projector; `clone_groups` copies it.
        sasrec: the recommender that all groups share.
    """

    def __init__(self, encoder: ItemEncoder, projector: MMProjector, sasrec: SASRec):
        super().__init__()
        self.encoder = encoder
        self.projectors = nn.ModuleList([projector])
        self.sasrec = sasrec

    @property
    def num_groups(self) -> int:
        """How many groups have an adapter and a projector."""
        return len(self.projectors)

    def clone_groups(self, num_groups: int) -> None:
        """Warm-start stage 3: every group gets a copy of the present group 0's adapter and projector."""
        self.encoder.clone_groups(num_groups)
        first = self.projectors[0]
        self.projectors = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(num_groups - 1))])

    def project(self, group: int, features: torch.Tensor) -> torch.Tensor:
        """Project item features by one group's projector, with the padding item's all-zero features put before them.

        Args:
            group: whose projector.
            features: [items, feature_dim]
        Returns:
            [1 + items, hidden]; row 0 is projector(0).
        """
        return self.projectors[group](F.pad(features, (0, 0, 1, 0)))  # [1 + items, hidden]

    def item_vectors(self, group: int, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Encode and project items as one group sees them.

        Args:
            group: whose adapter and projector act.
            inputs: what the encoder takes, for `items` items.
        Returns:
            [1 + items, hidden]; row 0 is the padding item's.
        """
        self.encoder.use_group(group)
        return self.project(group, self.encoder(*inputs))
