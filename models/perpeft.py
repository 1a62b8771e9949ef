"""PerPEFT: one sequential recommender, with an adapter and a projector for every user group."""
import copy
from typing import Protocol

import torch
from torch import Tensor, nn

from models.item_encoder import ItemEncoder
from models.projector import MMProjector
from models.sasrec import SASRec


class TensorBatch(Protocol):
    """A batch of one group's users on the model's device; sequences hold row numbers of the batch's own item table."""

    group: int
    items: Tensor  # distinct items, [rows]; row 0 is the padding item
    seq: Tensor  # [batch, time], 0 at padding
    positives: Tensor  # [batch, time]
    negatives: Tensor  # [batch, time]


class PerPEFT(nn.Module):
    """The whole model: SASRec for all groups, and an adapter in the encoder and a projector for each.

    With one group it is stage 1's global PEFT; with C groups it is stage 3's personalized PEFT.
    """

    def __init__(self, encoder: ItemEncoder, projector: MMProjector, sasrec: SASRec):
        super().__init__()
        self.encoder, self.projectors, self.sasrec = encoder, nn.ModuleList([projector]), sasrec

    @property
    def num_groups(self) -> int:
        """How many groups have an adapter and a projector."""
        return len(self.projectors)

    def clone_groups(self, num_groups: int) -> None:
        """Warm-start stage 3: every group gets a copy of the present group 0's adapter and projector."""
        self.encoder.clone_groups(num_groups)
        first = self.projectors[0]
        self.projectors = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(num_groups - 1))])

    def forward(self, batch: TensorBatch, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the positives, logits of the negatives, and the mask of real positions, [batch, time] each.

        Every distinct item is encoded once: `inputs` is what the encoder takes for the items `batch.items[1:]`.
        """
        item_vectors = self.item_vectors(batch.group, inputs)  # [rows, hidden]
        logits = self.sasrec(batch.seq, batch.positives, batch.negatives, item_vectors, batch.items)  # [batch, time] each
        return *logits, batch.seq != 0

    def item_vectors(self, group: int, inputs: tuple[Tensor, ...]) -> Tensor:
        """Encode and project items by a group's adapter and projector, [1 + items, hidden].

        Row 0 is the padding item's: an all-zero feature row before the projector, so its vector is projector(0).
        """
        self.encoder.use_group(group)
        features = self.encoder(*inputs)  # [items, feature_dim]
        padding = features.new_zeros(1, features.shape[1])  # F.pad of torch 2.2 refuses features of width 0
        return self.projectors[group](torch.cat([padding, features]))  # [1 + items, hidden]
