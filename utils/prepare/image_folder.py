"""A data set's folder of images filled by many threads: existing images stay, only whole images get their names."""
import contextlib
import io
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from utils.common.errors import PerPEFTError
from utils.common.files import remove_leftovers, sync
from utils.data.image_names import image_file_name
from utils.data.images import decoded_image, try_image
from utils.prepare.downloads import ImageError, PassingError

JPEG = b"\xff\xd8\xff"  # what every JPEG file begins with
QUALITY = 95


def read_image(path: str) -> bytes:
    """A file's content, or an ImageError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read ({error.strerror})") from error


def keep_image(content: bytes, path: Path) -> None:
    """Save a whole image under its final name: a JPEG as it came, another kind as RGB JPEG; else raise an ImageError."""
    try:
        with decoded_image(io.BytesIO(content)) as image:
            if not content.startswith(JPEG):
                image.save(encoded := io.BytesIO(), "JPEG", quality=QUALITY)
                content = encoded.getvalue()
    except (OSError, ValueError) as error:
        raise ImageError(f"no image: {error or type(error).__name__}") from error
    # an id may fill a file name to the last byte, so the temporary name is the thread's
    temporary = path.with_name(f".{threading.get_ident()}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Filling:
    """Of a folder's images, how many were there already and how many are new; raw id to why there is none."""

    kept: int = 0
    fetched: int = 0
    failed: dict[str, str] = field(default_factory=dict)


def fill_folder(
    folder: Path,
    sources: dict[str, str],
    get: Callable[[str], bytes],
    workers: int,
    stop: Callable[[], None] = lambda: None,
    give_up: int = 0,
) -> Filling:
    """Make `{raw id}.jpg` of every source, several at once; images that are there and whole are not fetched again.

    Args:
        folder: made where it is missing. One process at a time may fill it.
        sources: raw id to what `get` is asked for.
        get: returns a source's content or raises ImageError.
        workers: how many threads fetch.
        stop: makes running calls of `get` end soon; called when this function is interrupted or fails.
        give_up: raise a PerPEFTError after so many images in a row of which each failed in a way that may pass; 0 never does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)

    def make(raw_id: str) -> tuple[str, ImageError | bool]:
        """Whether the image is new, or why there is none."""
        path = folder / image_file_name(raw_id)
        with contextlib.suppress(OSError, ValueError):  # none, or not a whole one
            try_image(path)
            return raw_id, False
        try:
            keep_image(get(sources[raw_id]), path)
            return raw_id, True
        except ImageError as error:
            return raw_id, error

    filling, in_a_row = Filling(), 0
    bar = tqdm(total=len(sources), desc="images", unit="image", disable=None)
    with bar, contextlib.closing(_in_threads(make, sources, workers, stop)) as outcomes:
        for raw_id, outcome in outcomes:
            bar.update()
            if isinstance(outcome, ImageError):
                filling.failed[raw_id] = str(outcome)
            filling.fetched += outcome is True
            filling.kept += outcome is False
            if isinstance(outcome, PassingError):
                in_a_row += 1
            elif outcome is not False:  # an image that was there says nothing about the connection
                in_a_row = 0
            if give_up and in_a_row == give_up:
                raise PerPEFTError(
                    f"{give_up} images in a row could not be fetched (the last: {outcome}). Is there a connection? The same "
                    f"command continues with the images that are missing in {folder}; --give_up 0 never gives up"
                )
    return filling


def _in_threads(work: Callable, tasks: Iterable, workers: int, stop: Callable[[], None]) -> Iterator:
    """`work(task)` of every task, as they are done; only as many wait in line as keep all threads busy."""
    pool = ThreadPoolExecutor(workers)
    tasks, running = iter(tasks), set()
    try:
        while running := running | {pool.submit(work, task) for task in itertools.islice(tasks, 2 * workers - len(running))}:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BaseException:  # GeneratorExit included, which comes when the caller is interrupted
        stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
