"""The one image decoder: only kinds that run no other program, only whole images, only of bounded size, always 8-bit RGB."""
import contextlib
import functools
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

DECODING = "white background, deep images scaled"  # part of what a cache of pixels depends on: another text, another cache
BOMB_PIXELS = 2**27  # 134 million: an image that asks for more memory than this is no product photograph
LARGE_PIXELS = 2**24  # decoded one at a time, so that memory stays bounded however many cores there are
# What shops have. Pillow reads more, but hands some kinds to other programs (EPS to Ghostscript).
KINDS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
# The largest value of deep images by mode: Pillow reads 16-bit PNG and PGM as I;16 or I, 32-bit TIFF as I or F.
DEEP_RANGES = {"I": (65535, 2**31 - 1), "F": (1, 255, 65535)}

Result = TypeVar("Result")
_one_large_image = threading.Lock()


@functools.cache
def _readable_kinds() -> list[str]:
    Image.init()
    return [kind for kind in KINDS if kind in Image.OPEN]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Transparent images are put on white, as a person sees them and as transformers 5 does (4.49 shows the colours behind the
    transparency). Deep images are scaled from their range of values to 0..255, where transformers clips: 16-bit images from
    0..65535; mode I from 0..65535 if that holds all its values, else from 0..2^31-1; mode F from the smallest of 0..1, 0..255
    and 0..65535 that holds all its values. All other modes are converted by Pillow, as in transformers.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        ranges = DEEP_RANGES.get(image.mode, (65535,))
        largest = next((largest for largest in ranges if values.max() <= largest), ranges[-1])
        return Image.fromarray(np.rint(values * (255 / largest)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        background, image = Image.new("RGB", image.size, "white"), image.convert("RGBA")
        background.paste(image, mask=image)
        return background
    return image.convert("RGB")


@contextlib.contextmanager
def decoded_image(path: str | Path | io.BytesIO, edge: int = 224) -> Iterator[Image.Image]:
    """Decode one image to RGB, see `to_rgb`.

    Args:
        path: an image of any mode, or its content.
        edge: what its shortest edge will be resized to; images whose other edge would then become huge are refused.
    Raises:
        OSError: the file is missing, or not a whole image of a kind that is read.
        ValueError: its pixels would fill the memory, or it is damaged.
    """
    with contextlib.ExitStack() as held:
        try:
            with Image.open(path, formats=_readable_kinds()) as opened:
                width, height = opened.size
                longest_edge = max(width, height) / max(1, min(width, height)) * edge
                if width * height > BOMB_PIXELS or longest_edge * edge > BOMB_PIXELS:
                    raise ValueError(f"{width} x {height} pixels is too large")
                if width * height > LARGE_PIXELS:
                    held.enter_context(_one_large_image)
                image = to_rgb(opened)
        except UnidentifiedImageError:
            empty = not (path.getvalue() if isinstance(path, io.BytesIO) else os.path.getsize(path))
            raise OSError("the file is empty" if empty else "not an image of a kind that is read") from None
        except Image.DecompressionBombError:  # Pillow's own limit, reached while opening
            raise ValueError("far too many pixels") from None
        except (OSError, ValueError):
            raise
        except Exception as error:  # Pillow's decoders raise many kinds: SyntaxError, struct.error, IndexError, ...
            raise ValueError(f"damaged: {error or type(error).__name__}") from error
        yield image


def on_all_cores(read: Callable[[Path], Result], paths: list[Path]) -> Iterable[Result | Exception]:
    """`read(path)` of every path in order, on all cores; an exception is returned in place of the result."""

    def read_or_catch(path: Path) -> Result | Exception:
        try:
            return read(path)
        except Exception as error:
            return error

    # Threads, not processes: decoding runs outside the interpreter's lock, and a crash leaves nothing behind.
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(paths), 64 * workers):  # in portions, so that finished images do not pile up
            yield from pool.map(read_or_catch, paths[start : start + 64 * workers])


def try_image(path: Path) -> None:
    """Decode an image and discard it; raises as `decoded_image`."""
    with decoded_image(path):
        pass
