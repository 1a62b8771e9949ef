"""The files of a data set parsed: `user item` lines, raw ids, titles, the folder of images; problems are noted, not raised."""
import itertools
import math
import os
import re
import warnings
from pathlib import Path

import numpy as np

from utils.common.errors import PerPEFTError
from utils.common.pickles import load_pickle
from utils.data.image_names import RAW_ID_RULE, find_image_files, image_file_name, is_raw_id
from utils.data.problems import BLANK_IMAGES, LARGEST_NUMBER, SHOWN_PROBLEMS, Problems, format_value

MISSING_TITLE = "No description available."


def read_pairs(path: Path, problems: Problems) -> np.ndarray:
    """The file's `user item` lines, [lines, 2]; malformed ones are noted and left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy only warns about an empty file and about numbers that are no integers
        try:
            with path.open(encoding="utf-8-sig") as file:  # without the byte order mark that some editors write
                pairs = np.loadtxt(file, dtype=np.int64, comments=None, ndmin=2)
            if pairs.shape[1] == 2 and (pairs >= 1).all():
                return pairs
        except (ValueError, OverflowError, Warning):
            pass  # the slow way below finds out which lines are wrong
    pairs, malformed, below_one = [], [], []
    with path.open(encoding="utf-8-sig", errors="backslashreplace") as file:
        for number, line in enumerate(file, 1):
            fields = line.split(maxsplit=2)
            if not fields:
                continue
            integers = [int(field) for field in fields if re.fullmatch("[-+]?[0-9]{1,30}", field)]
            if (len(fields), len(integers)) != (2, 2) or max(integers) > LARGEST_NUMBER:
                malformed.append(f"line {number} {line.strip()[:60]!r}")
            elif min(integers) < 1:
                below_one.append(f"line {number} {line.strip()[:60]!r}")
            else:
                pairs.append(integers)
    problems.add(f"lines of {path.name} that are not two integers", malformed)
    problems.add(f"lines of {path.name} with a number below 1", below_one)
    if not pairs and not problems:
        problems.add("empty file", [path.name])
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _read_dict(path: Path, problems: Problems) -> dict | None:
    try:
        value = load_pickle(path)
    except PerPEFTError as error:
        problems.add("unreadable file", [error])
        return None
    if not isinstance(value, dict):
        problems.add("file without a dict", [f"{path.name} (a {type(value).__name__})"])
        return None
    return value


def read_raw_ids(path: Path, items: np.ndarray, problems: Problems) -> dict[int, str]:
    """Item numbers from 1, in order, and their raw ids; `items` are those that must have one."""
    table = _read_dict(path, problems)
    if not table:
        problems.add("empty file", [path.name] if table == {} else [])
        return {}
    usable = {item: raw_id for item, raw_id in table.items() if type(item) is int and item >= 0 and is_raw_id(raw_id)}
    wrong = [f"{format_value(item)}: {format_value(raw_id)}" for item, raw_id in table.items() if item not in usable]
    problems.add(f"entries of {path.name} that are not item number: raw id ({RAW_ID_RULE})", wrong)
    usable.pop(0, None)  # some files name the padding item
    usable = dict(sorted(usable.items()))
    num_items = max(usable, default=0)
    # One stray huge number must not make a huge table: no more gaps are listed than are shown.
    gaps = itertools.islice((item for item in range(1, num_items) if item not in usable), SHOWN_PROBLEMS)
    problems.add(f"gaps in the item numbers of {path.name}, which go up to {num_items}", gaps, num_items - len(usable))
    problems.add(f"items of users without raw id in {path.name}", np.setdiff1d(items, np.fromiter(usable, np.int64, len(usable))))
    seen: dict[str, int] = {}
    twice = [f"{name} (items {seen[name]} and {item})" for item, name in usable.items() if seen.setdefault(name, item) != item]
    problems.add(f"duplicate raw ids in {path.name}", twice)
    return usable


def read_titles(path: Path, raw_ids: list[str], problems: Problems, remarks: Problems) -> list[str]:
    """One title per item, MISSING_TITLE if it has none."""
    texts = _read_dict(path, problems)
    if texts is None:
        return [MISSING_TITLE] * len(raw_ids)
    titles, missing, no_text = [], [], []
    for raw_id in raw_ids:
        title = texts.get(raw_id)
        if isinstance(title, str) and title.strip():
            # half of a surrogate pair, left by careless truncation, could not be written to any file
            titles.append(title.encode(errors="replace").decode())
            continue
        titles.append(MISSING_TITLE)
        if title is None or isinstance(title, str) or (isinstance(title, float) and math.isnan(title)):
            missing.append(raw_id)
        else:
            no_text.append(f"{raw_id}: {format_value(title)}")
    remarks.add(f"items without a title, replaced by '{MISSING_TITLE}'", missing)
    remarks.add(f"items whose title is not text, replaced by '{MISSING_TITLE}'", no_text)
    return titles


def find_images(
    folder: Path, raw_ids: dict[int, str], missing_images: str, problems: Problems, remarks: Problems
) -> dict[int, Path]:
    """The image files that are there, by item number; missing ones are noted."""
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        problems.add("folder of images that cannot be read", [f"{folder} ({error.strerror})"])
        return {}
    found = find_image_files(names, raw_ids)
    missing = [f"{image_file_name(raw_id)} (item {item})" for item, raw_id in raw_ids.items() if item not in found]
    if missing_images == "error":
        problems.add(f"items without an image in {folder.name}/ (--missing_images blank continues without them)", missing)
    else:
        remarks.add(BLANK_IMAGES, missing)
    return {item: folder / found[item] for item in raw_ids if item in found}
