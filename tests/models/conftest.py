"""CLIP encoders with adapters, and items that they read."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from models import ClipPeftEncoder
from models.peft_configs import peft_config
from tests.conftest import draw_image
from utils.items.preprocessing import read_image
from utils.training.sampling import Batch

TITLES = ["red lamp number 1", "a blue mug", "pale chair", "green clock number 4, very long title indeed, longer than any"]
# what the defaults do not fit, on layers 32 wide
SMALL = {
    "c3a": {"block_size": 8}, "fourierft": {"n_frequency": 64}, "miss": {"r": 8}, "road": {"group_size": 8}, "shira": {"r": 4},
    "vblora": {"num_vectors": 16, "vector_length": 8, "topk": 2}, "waveft": {"n_frequency": 64},
}  # fmt: skip

SEQ, POSITIVES, NEGATIVES = np.array([[[0, 0, 1, 2], [1, 2, 3, 4]], [[0, 0, 2, 3], [2, 3, 4, 1]], [[0, 0, 4, 4], [1, 1, 1, 2]]])
BATCH = Batch(1, np.array([0, 2, 4, 6, 8]), SEQ, POSITIVES, NEGATIVES, num_transitions=6)  # of group 1


@pytest.fixture(scope="session")
def inputs(tiny_clip, tmp_path_factory):
    """Pixels and tokens of four items as the store returns them, and what CLIPModel takes as the real processors return it."""
    processor, tokenizer = AutoImageProcessor.from_pretrained(tiny_clip, use_fast=False), AutoTokenizer.from_pretrained(tiny_clip)
    paths = [tmp_path_factory.getbasetemp() / f"item_{item}.jpg" for item in range(1, 5)]
    for item, path in enumerate(paths, 1):
        draw_image(item).save(path)
    pixels = torch.from_numpy(np.stack([read_image(path, processor) for path in paths]))
    of_clip = processor([Image.open(path) for path in paths], return_tensors="pt")
    of_clip |= tokenizer(TITLES, padding=True, truncation=True, max_length=16, return_tensors="pt")
    return SimpleNamespace(pixels=pixels, tokens=of_clip["input_ids"], of_clip=of_clip)


@pytest.fixture(scope="session")
def make_encoder(tiny_clip):

    def make(kind="lora", rank=4, **options):
        torch.manual_seed(0)
        processor = AutoImageProcessor.from_pretrained(tiny_clip, use_fast=False)
        config = peft_config(kind, rank, SMALL.get(kind))
        return ClipPeftEncoder(CLIPModel.from_pretrained(tiny_clip), config, processor, **options).eval()

    return make


@torch.no_grad()
def shake(parameters, seed=0, size=0.3):
    """Move parameters away from where they start, at which adapters change nothing."""
    random = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(size * torch.randn(parameter.shape, generator=random))


def features(encoder, inputs, group=0):
    encoder.use_group(group)
    return encoder(inputs.pixels, inputs.tokens)
