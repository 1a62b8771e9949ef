"""A category of Amazon Reviews 2023 from its two files: reviews, and what is known of the items."""
import collections
import gzip
import io
import json
import os
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from utils.common.errors import PerPEFTError
from utils.data.image_names import is_raw_id
from utils.prepare.interactions import key_of
from utils.prepare.titles import clean_title

GZIP = b"\x1f\x8b"  # what such a file begins with, whatever its name
LONGEST_LINE = 2**24  # bytes; the rest of a longer one counts as further lines, malformed like the first
IMAGE_SIZES = ("large", "hi_res", "thumb")  # large has 500 pixels a side, of which CLIP sees 224
LARGEST_TIME = 2**53  # up to here a float holds every whole number


class ItemText(NamedTuple):
    """What a data set needs of one item.

    Attributes:
        raw_id: the shop's id.
        title: cleaned, not empty.
        image: an address or a path.
    """

    raw_id: str
    title: str
    image: str


class JsonLines:
    """The objects in a .jsonl or .jsonl.gz file, one a line.

    Attributes:
        lines, malformed: how many were read, and how many of them were of no use; blank lines are neither.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.lines = self.malformed = 0
        if not self.path.is_file():
            raise PerPEFTError(f"{path} is no file")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.lines = self.malformed = 0
        with (
            self.path.open("rb") as file,
            tqdm(total=os.path.getsize(self.path), desc=self.path.name, unit="B", unit_scale=True, disable=None) as bar,
        ):
            try:
                for line in _lines(file):
                    self.lines += 1
                    try:
                        value = json.loads(line)
                    except (ValueError, RecursionError):
                        value = None
                    if isinstance(value, dict):
                        yield value
                    else:
                        self.malformed += 1
                    if self.lines % 4096 == 0:
                        bar.update(file.tell() - bar.n)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise PerPEFTError(f"{self.path} is cut off or damaged after {self.lines:,} lines; fetch it again") from error

    def require_some(self, kind: str) -> None:
        """Do nothing where a line was of use.

        Raises:
            PerPEFTError: none was; `kind` says what was looked for.
        """
        if self.lines == self.malformed:
            raise PerPEFTError(f"{self.path}: none of its {self.lines:,} lines is {kind}")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    packed = file.peek(len(GZIP)).startswith(GZIP)
    content = io.BufferedReader(gzip.GzipFile(fileobj=file), 2**18) if packed else file
    while line := content.readline(LONGEST_LINE):
        if not line.isspace():
            yield line


class AmazonCategory:
    """Reviews and items; the files are read as often as they are asked for, and nothing of them is kept.

    Args:
        reviews, meta: the category's two files.
        images: a folder with `{raw id}.jpg` (or another kind) an image, in place of the addresses in `meta`.
    Attributes:
        left_out: why items were left out, and how many, once `item_keys` has read them.
    """

    def __init__(self, reviews: str | Path, meta: str | Path, images: str | Path | None = None):
        self.reviews, self.meta = JsonLines(reviews), JsonLines(meta)
        self.left_out: collections.Counter[str] = collections.Counter()
        self._images = None if images is None else _images_by_name(Path(images))

    @property
    def malformed(self) -> int:
        """How many lines of reviews were of no use."""
        return self.reviews.malformed

    def item_keys(self) -> np.ndarray:
        """The keys of the items that have all a data set needs.

        Raises:
            PerPEFTError: the file holds no items, or none of them is of use.
        """
        self.left_out.clear()
        keys = array("Q")
        for found in self._all_items():
            if isinstance(found, ItemText):
                keys.append(key_of(found.raw_id))
            else:
                self.left_out[found] += 1
        self.meta.require_some("an item of Amazon Reviews 2023 (with parent_asin, title, images)")
        if self.meta.malformed:
            self.left_out["malformed lines"] = self.meta.malformed
        if not keys:
            raise PerPEFTError(f"{self.meta.path}: no item is of use ({_told(self.left_out)})")
        return np.array(keys)

    def purchases(self) -> Iterator[tuple[str, str, float]]:
        """User, item and time in milliseconds of every review, in the order of the file.

        Raises:
            PerPEFTError: the file holds no reviews.
        """
        for line in self.reviews:
            user, item, time = line.get("user_id"), line.get("parent_asin"), line.get("timestamp")
            if _is_id(user) and _is_id(item) and type(time) in (int, float) and abs(time) <= LARGEST_TIME:
                yield user, item, float(time)
            else:
                self.reviews.malformed += 1
        self.reviews.require_some("a review of Amazon Reviews 2023 (with user_id, parent_asin, timestamp)")

    def items(self, keys: np.ndarray) -> dict[int, ItemText]:
        """The items of some keys; where a file names an item twice, the first time counts."""
        wanted = dict.fromkeys(keys.tolist())
        for found in self._all_items():
            if isinstance(found, ItemText):
                key = key_of(found.raw_id)
                if key in wanted and wanted[key] is None:
                    wanted[key] = found
        return wanted

    def _all_items(self) -> Iterator[ItemText | str]:
        """Every item of the file, or why it is of no use."""
        for line in self.meta:
            raw_id = line.get("parent_asin")
            if not _is_id(raw_id):
                self.meta.malformed += 1
                continue
            title = line.get("title")
            title = clean_title(title) if isinstance(title, str) else ""
            image = _address(line.get("images")) if self._images is None else self._images.get(raw_id)
            if not is_raw_id(raw_id):
                yield "id with a line break"
            elif not title:
                yield "no title"
            elif image is None:
                yield "no image"
            else:
                yield ItemText(raw_id, title, image)


def _told(reasons: collections.Counter[str]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items())


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _address(images: Any) -> str | None:
    """The address of an item's main image, or of its first where none is called main; None where there is none."""
    images = [image for image in images if isinstance(image, dict)] if isinstance(images, list) else []
    for image in sorted(images, key=lambda image: image.get("variant") != "MAIN"):
        for size in IMAGE_SIZES:
            if _is_id(image.get(size)):
                return image[size]
    return None


def _images_by_name(folder: Path) -> dict[str, str]:
    """Paths of a folder's files by their names without the ending; .jpg counts before others."""
    try:
        names = sorted((entry.name for entry in os.scandir(folder)), key=lambda name: (name.lower().endswith(".jpg"), name))
    except OSError as error:
        raise PerPEFTError(f"the folder of images {folder} cannot be read ({error.strerror})") from error
    return {os.path.splitext(name)[0]: str(folder / name) for name in names if not name.startswith(".")}
