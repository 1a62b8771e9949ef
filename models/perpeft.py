"""PerPEFT: one sequential recommender, with an adapter and a projector for every user group."""
import copy
from typing import Protocol

import torch
from torch import nn

from models.item_encoder import ItemEncoder
from models.projector import MMProjector
from models.sasrec import SASRec


class TensorBatch(Protocol):
    """A batch of one group's users on the model's device; sequences hold row numbers of the batch's own item table."""

    group: int
    items: torch.Tensor  # distinct items, [rows]; row 0 is the padding item
    seq: torch.Tensor  # [batch, time], 0 at padding
    positives: torch.Tensor  # [batch, time]
    negatives: torch.Tensor  # [batch, time]


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

    def forward(
        self, batch: TensorBatch, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of a batch, every distinct item encoded once.

        Args:
            batch: users, positives and negatives.
            inputs: what the encoder takes for the items `batch.items[1:]`.
        Returns:
            logits of the positives, logits of the negatives, and the mask of real positions, [batch, time] each
        """
        item_vectors = self.item_vectors(batch.group, inputs)  # [rows, hidden]
        logits = self.sasrec(batch.seq, batch.positives, batch.negatives, item_vectors, batch.items)
        return *logits, batch.seq != 0

    def item_vectors(self, group: int, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Encode and project items as one group sees them.

        The padding item is an all-zero feature row before the projector, so its vector is projector(0).

        Args:
            group: whose adapter and projector act.
            inputs: what the encoder takes, for `items` items.
        Returns:
            [1 + items, hidden]; row 0 is the padding item's.
        """
        self.encoder.use_group(group)
        features = self.encoder(*inputs)  # [items, feature_dim]
        padding = features.new_zeros(1, features.shape[1])  # F.pad of torch 2.2 refuses features of width 0
        return self.projectors[group](torch.cat([padding, features]))  # [1 + items, hidden]
