"""Images decoded safely: only kinds that run no other program, only whole ones, only of bearable size."""
import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

BOMB_PIXELS = 2**27  # 134 million: an image that asks for more memory than this is no product photograph
LARGE_PIXELS = 2**24  # decoded one at a time, so that memory stays bounded however many cores there are
CLIP_EDGE = 224  # what CLIP resizes an image's shortest edge to
# What shops have. Pillow reads more, but hands some kinds to other programs (EPS to Ghostscript).
KINDS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")

Result = TypeVar("Result")
_one_large_image = threading.Lock()


@functools.cache
def _readable_kinds() -> list[str]:
    Image.init()
    return [kind for kind in KINDS if kind in Image.OPEN]


@contextlib.contextmanager
def decoded_image(path: str | Path, edge: int = CLIP_EDGE) -> Iterator[Image.Image]:
    """Decode one image to RGB.

    Args:
        path: an image of any mode.
        edge: what its shortest edge will be resized to; the other may not become huge thereby.
    Yields:
        the image
    Raises:
        OSError: the file is missing, or no whole image of a kind that is read.
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
                image = opened.convert("RGB")
        except UnidentifiedImageError:
            empty = os.path.getsize(path) == 0
            raise OSError("the file is empty" if empty else "no image of a kind that is read") from None
        except Image.DecompressionBombError:  # Pillow's own limit, met while opening
            raise ValueError("its pixels are far too many") from None
        except (OSError, ValueError):
            raise
        except Exception as error:  # Pillow's decoders raise many kinds: SyntaxError, struct.error, IndexError, ...
            raise ValueError(f"damaged: {error or type(error).__name__}") from error
        yield image


def on_all_cores(read: Callable[[Path], Result], paths: list[Path]) -> Iterable[Result | Exception]:
    """`read(path)` of every path in order, on all cores; where it raises, the exception comes in place of the result."""

    def read_or_tell(path: Path) -> Result | Exception:
        try:
            return read(path)
        except Exception as error:
            return error

    # Threads, not processes: decoding runs outside the interpreter's lock, and a crash leaves nothing behind.
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(paths), 64 * workers):  # in portions, so that finished images do not pile up
            yield from pool.map(read_or_tell, paths[start : start + 64 * workers])


def try_image(path: Path) -> None:
    """Decode an image and forget it.

    Raises:
        OSError, ValueError: as in `decoded_image`.
    """
    with decoded_image(path):
        pass
