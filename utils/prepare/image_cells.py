"""The image that a table's cell names: a path, an address, or lists and objects of them as shops and libraries write them."""
import ast
import collections
import contextlib
import itertools
import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from utils.common.errors import PerPEFTError
from utils.data.image_names import image_file_name

SIZES = ("large", "hi_res", "thumb", "url", "src", "path")  # "large" of Amazon has 500 pixels a side, of which CLIP sees 224
WEB = ("http://", "https://")
# Between several images in one cell, of which the first counts; and how numpy prints a list, which Python reads otherwise.
NEXT_ADDRESS = re.compile(r"\s*[,;|\s]\s*(?=(?:https?:)?//)", re.IGNORECASE)
NEXT_PATH = re.compile(r"\s*[,;|]\s*")
NUMPY_ARRAY = re.compile(r"""array\(\[\s*(['"])(.*?)\1|\[\s*(['"])([^'"]*)\3\s+['"]""")


def first_image(cell: str | None) -> str | None:
    """The main image that a cell names, else its first; None if it names none.

    A cell is a path or address, or JSON or a Python literal: a list, an object by size, or an object of lists.
    """
    if cell is None or not cell.startswith(("[", "{", '"', "array(")):
        return cell
    if array := NUMPY_ARRAY.match(cell):
        return array[2] or array[4]
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return _first_of(parse(cell))
    return cell


def _first_of(value: Any) -> str | None:
    if isinstance(value, str):
        value = value.strip()
        return first_image(value) if value.startswith(("[", "{")) else value or None
    entries = value if isinstance(value, list) else []
    if isinstance(value, dict):
        lists = {key: entries for key, entries in value.items() if isinstance(entries, list)}
        if not lists.keys() & {*SIZES, "variant"}:
            return next((found for size in SIZES if (found := _first_of(value.get(size)))), None)
        entries = [dict(zip(lists, row)) for row in itertools.zip_longest(*lists.values())]  # so `datasets` returns a list
    main_first = sorted(entries, key=lambda entry: not (isinstance(entry, dict) and entry.get("variant") == "MAIN"))
    return next((found for entry in main_first if (found := _first_of(entry))), None)


def images_by_id(folder: Path) -> dict[str, str]:
    """Paths of the files in a folder and its subfolders by their names with and without the ending; .jpg counts before others.

    A file in a subfolder is also found without the subfolder's name, unless another has the same name; a name of decomposed
    letters, as macOS writes them, also by the composed ones. A folder that cannot be read is a PerPEFTError.
    """

    def fail(error: OSError) -> None:
        raise PerPEFTError(f"the folder of images {folder} cannot be read ({error.strerror})") from error

    paths = [Path(place, name) for place, _, names in os.walk(folder, onerror=fail) for name in names if not name.startswith(".")]
    paths.sort(key=lambda path: (path.suffix.lower() == ".jpg", path))
    whole = {path.relative_to(folder).as_posix(): str(path) for path in paths}
    found = whole | {os.path.splitext(name)[0]: path for name, path in whole.items()}
    counts = collections.Counter(name.rpartition("/")[2] for name in found)
    short = {name.rpartition("/")[2]: path for name, path in found.items()}
    found = {name: path for name, path in short.items() if counts[name] == 1} | found
    return {unicodedata.normalize("NFC", name): path for name, path in found.items()} | found


class ImageFinder:
    """Where each item's image is: paths in cells are relative to `folder`, or name files in `images`.

    In `images`, files named by the item's id count before cells.
    """

    def __init__(self, folder: Path, images: Path | None = None):
        self._folders = [folder] if images is None else [folder, images]
        self._images = {} if images is None else images_by_id(images)

    def find(self, item: str | None, cell: str | None) -> str | None:
        """The address or path of an item's image, which may not exist; None if there is none."""
        if self._images and item is not None:
            named = "" if cell is None else os.path.splitext(cell.replace("\\", "/"))[0].lstrip("/")  # with another ending
            for name in (item, image_file_name(item).removesuffix(".jpg"), named):
                if found := self._images.get(name) or self._images.get(unicodedata.normalize("NFC", name)):
                    return found
        if (found := first_image(cell)) is None:
            return None
        if found.lower().startswith((*WEB, "//")):
            first = NEXT_ADDRESS.split(found)[0]
            return f"https:{first}" if first.startswith("//") else first
        names = dict.fromkeys((found.removeprefix("file://"), found.replace("\\", "/"), NEXT_PATH.split(found)[0]))
        paths = [str(folder / name) for folder in self._folders for name in names]
        return next((path for path in paths if is_there(path)), paths[0])


def is_there(source: str | None) -> bool:
    """Whether a source is an address, or the path of a file."""
    return source is not None and (source.lower().startswith(WEB) or os.path.isfile(source))
