"""Images as a foundation model's own image processor prepares them, up to rescaling and normalising."""
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from utils.data.images import decoded_image

PLAIN_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorPil")  # of transformers 4 and 5, both by Pillow


def _resized_size(processor: BaseImageProcessor, width: int, height: int) -> tuple[int, int]:
    """Width and height after CLIP's resize of the shortest edge, which cuts the longer one to whole pixels."""
    edge = processor.size["shortest_edge"]
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def output_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width of the images that an image processor returns.

    Raises:
        ValueError: they differ from image to image, or it fails.
    """
    found = set()
    for width, height in ((60, 40), (40, 70)):
        try:
            options = {"return_tensors": "np", "input_data_format": "channels_last"}
            found.add(processor(np.zeros((height, width, 3), dtype=np.uint8), **options)["pixel_values"].shape[1:])
        except Exception as error:  # of a library's or of the model folder's own
            raise ValueError(f"the image processor fails: {type(error).__name__}: {error}".splitlines()[0]) from error
    if len(found) > 1 or len(shape := found.pop()) != 3 or shape[0] != 3:
        raise ValueError("its image processor makes images of several sizes; set do_center_crop and crop_size in its settings")
    return shape[1:]


def _is_plain_clip(processor: BaseImageProcessor) -> bool:
    if type(processor).__name__ not in PLAIN_PROCESSORS or "shortest_edge" not in dict(processor.size):
        return False
    crops_inside = max(dict(processor.crop_size).values()) <= processor.size["shortest_edge"]
    return processor.do_convert_rgb and processor.do_resize and processor.do_center_crop and crops_inside


def bare_image(image: Image.Image | np.ndarray, processor: BaseImageProcessor) -> np.ndarray:
    """An image as its processor makes it before rescaling and normalising, uint8 [3, height, width]."""
    # The data format is said, since the processor takes an image 3 pixels high for one with its channels first.
    options = {"do_rescale": False, "do_normalize": False, "return_tensors": "np", "input_data_format": "channels_last"}
    if hasattr(processor, "include_top"):  # EfficientNet's second normalisation
        options["include_top"] = False
    return processor(image, **options)["pixel_values"][0].astype(np.uint8)


def read_image(path: str | Path, processor: BaseImageProcessor) -> np.ndarray:
    """Decode, resize and crop one image, bit for bit as the image processor leaves it before rescaling (see `to_rgb`).

    Args:
        path: an image of any mode that Pillow reads.
        processor: CLIP's image processor.
    Returns:
        uint8 [3, height, width]
    Raises:
        OSError: the file is missing or no whole image.
        ValueError: its pixels would fill the memory, or it is damaged.
    """
    with decoded_image(path, max(dict(processor.size).values())) as image:
        if not _is_plain_clip(processor):
            return bare_image(image, processor)
        # What the processor does, without its way through numpy, which holds the interpreter's lock: threads scale with this.
        width, height = _resized_size(processor, *image.size)
        pixels = np.asarray(image.resize((width, height), processor.resample))  # [height, width, 3]
    crop_height, crop_width = processor.crop_size["height"], processor.crop_size["width"]
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return pixels[top : top + crop_height, left : left + crop_width].transpose(2, 0, 1)
