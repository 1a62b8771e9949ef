"""The torch modules of PerPEFT; nothing here reads files of a data set or parses options."""
from models.clip_peft import ClipPeftEncoder
from models.iisan import IISAN, IISANEncoder
from models.item_encoder import FrozenEncoder, ItemEncoder
from models.perpeft import PerPEFT
from models.projector import MMProjector, NoProjector
from models.sasrec import SASRec

__all__ = [
    "IISAN", "ClipPeftEncoder", "FrozenEncoder", "IISANEncoder", "ItemEncoder", "MMProjector", "NoProjector", "PerPEFT", "SASRec",
]  # fmt: skip
