"""Images as a foundation model's own image processor prepares them, up to rescaling and normalising."""
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor

from utils.data.images import decoded_image


def processed(image: Image.Image | np.ndarray, processor: BaseImageProcessor, **options: Any) -> np.ndarray:
    """An image as its processor makes it, [3, height, width]."""
    # The data format is named, since the processor takes an image 3 pixels high for one with its channels first.
    return processor(image, return_tensors="np", input_data_format="channels_last", **options)["pixel_values"][0]


def bare_image(image: Image.Image | np.ndarray, processor: BaseImageProcessor) -> np.ndarray:
    """An image as its processor makes it before rescaling and normalising, uint8 [3, height, width]."""
    options = {"include_top": False} if hasattr(processor, "include_top") else {}  # EfficientNet's second normalisation
    return processed(image, processor, do_rescale=False, do_normalize=False, **options).astype(np.uint8)


def output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of the images that an image processor returns.

    Raises:
        ValueError: they differ from image to image, or it fails.
    """
    try:
        shapes = {processed(np.zeros((height, width, 3), np.uint8), processor).shape for width, height in ((60, 40), (40, 70))}
    except Exception as error:  # of a library's or of the model folder's own
        raise ValueError(f"the image processor fails: {type(error).__name__}: {error}".splitlines()[0]) from error
    shape = shapes.pop()
    if shapes or len(shape) != 3 or shape[0] != 3:
        raise ValueError("its image processor makes images of several sizes; set do_center_crop and crop_size in its settings")
    return shape[1:]


def _is_plain_clip(processor: BaseImageProcessor) -> bool:
    by_pillow = type(processor).__name__ in ("CLIPImageProcessor", "CLIPImageProcessorPil")  # of transformers 4 and 5
    if not by_pillow or "shortest_edge" not in dict(processor.size):
        return False
    crops_inside = max(dict(processor.crop_size).values()) <= processor.size["shortest_edge"]
    return processor.do_convert_rgb and processor.do_resize and processor.do_center_crop and crops_inside


def read_image(path: str | Path, processor: BaseImageProcessor) -> np.ndarray:
    """An image of any mode as uint8 [3, height, width], bit for bit as its processor leaves it before rescaling (see `to_rgb`).

    Raises:
        OSError: the file is missing or no whole image.
        ValueError: its pixels would fill the memory, or it is damaged.
    """
    with decoded_image(path, max(dict(processor.size).values())) as image:
        if not _is_plain_clip(processor):
            return bare_image(image, processor)
        # What the processor does, without its way through numpy, which holds the interpreter's lock: threads scale with this.
        edge, crop = processor.size["shortest_edge"], processor.crop_size
        width, height = (int(edge * side / min(image.size)) for side in image.size)  # the longer one cut to whole pixels
        left, top = (width - crop["width"]) // 2, (height - crop["height"]) // 2
        box = (left, top, left + crop["width"], top + crop["height"])
        return np.asarray(image.resize((width, height), processor.resample).crop(box)).transpose(2, 0, 1)
