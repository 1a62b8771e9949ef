"""The demo's CLIP: a small one, trained on first use on drawn images with captions as on the web."""
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils.common.files import build_once
from utils.prepare.demo import draw_items, web_caption
from utils.prepare.demo_drawing import draw_image
from utils.prepare.small_clip import IMAGE_SIZE, image_processor, train_small_clip

DEMO_PAIRS = 8000  # drawn images with captions that the demo's CLIP learns from


def demo_pairs(image_size: int = IMAGE_SIZE, seed: int = 0, num: int = DEMO_PAIRS) -> tuple[torch.Tensor, list[str]]:
    """Draw other items than the demo's: uint8 [num, 3, image_size, image_size] and as many captions, by the seed."""
    rng = np.random.default_rng([seed, 1])  # another stream than make_demo's, so the items differ
    items = draw_items(num, rng)
    captions = [web_caption(item, rng) for item in items]
    resample = image_processor().resample
    bar = tqdm(items, "Drawing images with captions", unit="image", leave=False, disable=None)
    images = np.stack([np.asarray(draw_image(item, rng).resize((image_size, image_size), resample)) for item in bar])
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), captions


def demo_clip(cache_folder: str | Path) -> Path:
    """The folder of the demo's CLIP, `demo_small_clip` in another; on first use it is trained, which takes a minute or two."""
    folder = Path(cache_folder) / "demo_small_clip"
    with build_once(folder) as missing:
        if missing:
            print("Making the demo's CLIP: drawing images with captions and training on them, a minute or two on 2 CPU cores")
            train_small_clip(*demo_pairs(), folder, vary=False)  # its signs are too small to be shifted
    return folder
