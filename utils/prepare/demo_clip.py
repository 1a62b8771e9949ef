"""The demo's CLIP: drawn images with captions, and a small CLIP trained on them on first use."""
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.common.files import build_once
from utils.prepare.demo import draw_caption_pairs
from utils.prepare.small_clip import IMAGE_SIZE, image_processor, train_small_clip

DEMO_PAIRS = 8000  # drawn images with captions that the demo's CLIP learns from


def demo_pairs(image_size: int = IMAGE_SIZE, seed: int = 0, num: int = DEMO_PAIRS) -> tuple[torch.Tensor, list[str]]:
    """Draw what the demo's CLIP learns from: uint8 [num, 3, image_size, image_size] and as many captions."""
    images, captions = draw_caption_pairs(num, seed)  # [num, 3, drawn size, drawn size]
    resample = image_processor().resample
    small = [Image.fromarray(image.transpose(1, 2, 0)).resize((image_size, image_size), resample) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small]).transpose(0, 3, 1, 2).copy()), captions


def demo_clip(cache_folder: str | Path) -> Path:
    """The folder of the demo's CLIP, `demo_small_clip` in another; on first use it is trained, which takes a minute or two."""
    folder = Path(cache_folder) / "demo_small_clip"
    with build_once(folder) as missing:
        if missing:
            print("Making the demo's CLIP: drawing images with captions and training on them, a minute or two on 2 CPU cores")
            train_small_clip(*demo_pairs(), folder, vary=False)  # its signs are too small to be shifted
    return folder
