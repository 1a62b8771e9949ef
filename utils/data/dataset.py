"""A data set from its files: purchase histories, raw ids, titles, image paths, and the leave-last-out split."""
import csv
import itertools
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.common.errors import PerPEFTError
from utils.common.pickles import load_pickle
from utils.data.image_names import RAW_ID_RULE, find_image_files, image_file_name, is_raw_id
from utils.data.images import on_all_cores, try_image

MISSING_TITLE = "No description available."
PAPER_DATASETS = ("sports_outdoors", "toys_games", "beauty_care", "arts")
SHOWN_PROBLEMS = 10
LARGEST_NUMBER = np.iinfo(np.int64).max
UNREADABLE_IMAGES = "unreadable images (mend them, or go on without by --missing_images blank)"
BLANK_IMAGES = "images that are missing or cannot be read, for which black ones stand in"


@dataclass(frozen=True)
class Histories:
    """Every user's items in time order, one behind another in one array.

    Attributes:
        items: item indices from 1, [purchases].
        offsets: user row u's items are items[offsets[u]:offsets[u + 1]], [users + 1].
    """

    items: np.ndarray
    offsets: np.ndarray

    @property
    def num_users(self) -> int:
        """How many users there are."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """How many items each user has, [users]."""
        return np.diff(self.offsets)

    @property
    def users(self) -> np.ndarray:
        """The user row of every purchase, [purchases]."""
        return np.repeat(np.arange(self.num_users), self.lengths)

    def __getitem__(self, user: int) -> np.ndarray:
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def shortened(self, lengths: np.ndarray) -> "Histories":
        """The first `lengths[u]` items of every user, lengths [users]."""
        position = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], self.lengths)
        keep = position < np.repeat(lengths, self.lengths)
        return Histories(self.items[keep], np.concatenate([[0], np.cumsum(lengths)]))

    def last(self, users: np.ndarray, count: int) -> np.ndarray:
        """The last `count` items of each of some users, left-padded with 0, [len(users), count]."""
        column = self.offsets[users + 1][:, None] + np.arange(-count, 0)  # [users, count]
        real = column >= self.offsets[users][:, None]
        return np.where(real, self.items[np.where(real, column, 0)] if len(self.items) else 0, 0)

    @classmethod
    def of_lists(cls, lists: Iterable[Iterable[int]]) -> "Histories":
        """Histories from one list of items a user."""
        arrays = [np.asarray(list(items), dtype=np.int64) for items in lists]
        offsets = np.concatenate([[0], np.cumsum([len(items) for items in arrays])]).astype(np.int64)
        return cls(np.concatenate(arrays) if arrays else np.empty(0, np.int64), offsets)


@dataclass(frozen=True)
class Split:
    """Leave-last-out (DESIGN: last item test, last but one valid, the rest train; under 3 purchases all are train).

    Attributes:
        train: training histories.
        train_and_valid: the same with the valid item added; what users are grouped by.
        valid, test: the held-out item of each user, 0 for users who are never evaluated, [users].
    """

    train: Histories
    train_and_valid: Histories
    valid: np.ndarray
    test: np.ndarray

    @property
    def evaluated_users(self) -> np.ndarray:
        """Rows of the users with held-out items."""
        return np.flatnonzero(self.test)


def leave_last_out(histories: Histories) -> Split:
    """Split every history with 3 or more purchases into train, valid (last but one) and test (last)."""
    lengths = histories.lengths
    held_out = lengths >= 3
    valid = np.zeros(len(lengths), dtype=np.int64)
    test = np.zeros(len(lengths), dtype=np.int64)
    ends = histories.offsets[1:][held_out]
    valid[held_out] = histories.items[ends - 2]
    test[held_out] = histories.items[ends - 1]
    return Split(
        train=histories.shortened(lengths - 2 * held_out),
        train_and_valid=histories.shortened(lengths - held_out),
        valid=valid,
        test=test,
    )


@dataclass(frozen=True)
class Dataset:
    """One data set; list position i belongs to item i + 1, history row u to user `user_ids[u]`.

    Attributes:
        name: as on the command line.
        folder: where its files lie.
        user_ids: the users' numbers in the file, [users].
        histories: purchases in time order.
        raw_ids: the shop's own item ids.
        titles: MISSING_TITLE where there is none.
        image_paths: images, which need not have been looked at yet.
        missing_titles: how many titles were missing.
    """

    name: str
    folder: Path
    user_ids: np.ndarray
    histories: Histories
    raw_ids: list[str]
    titles: list[str]
    image_paths: list[Path]
    missing_titles: int

    @property
    def num_items(self) -> int:
        """Items are 1..num_items."""
        return len(self.raw_ids)

    @property
    def num_users(self) -> int:
        """How many users there are."""
        return self.histories.num_users

    def counts(self) -> dict[str, int]:
        """Users, items and purchases, as in the columns of the paper's Table 1."""
        return {"users": self.num_users, "items": self.num_items, "interactions": len(self.histories.items)}


def _told(value: Any) -> str:
    """A value out of a data file, in few characters whatever it is: a nested list's repr could fill the memory."""
    if isinstance(value, str):
        return repr(value[:60])
    if value is None or (isinstance(value, (int, float)) and abs(value) <= LARGEST_NUMBER):
        return repr(value)
    return f"<{type(value).__name__}>"


def told_image(path: Path, item: int, error: Exception) -> str:
    """An image that cannot be read, as all reports name it."""
    return f"{path.name} (item {item}: {error or type(error).__name__})"


class Problems:
    """Everything wrong with a data set, gathered so that it is reported at once."""

    def __init__(self):
        self._kinds: dict[str, tuple[list[str], int]] = {}  # the first few examples, and how many there are

    def add(self, kind: str, examples: Iterable[object], count: int | None = None) -> None:
        """Note that something is wrong in one way with each of `examples`; no examples, no problem.

        Args:
            kind: what is wrong.
            examples: where, in few words each; only the first ten are told.
            count: how often it occurs, where that is not the number of examples.
        """
        examples = list(examples)
        if examples:
            shown, before = self._kinds.get(kind, ([], 0))
            shown = shown + [str(example) for example in examples[: SHOWN_PROBLEMS - len(shown)]]
            self._kinds[kind] = (shown, before + (len(examples) if count is None else count))

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def __str__(self) -> str:
        lines = []
        for kind, (shown, count) in self._kinds.items():
            more = f" and {count - len(shown)} more" if count > len(shown) else ""
            line = f"  {kind} ({count}): {', '.join(shown)}{more}"
            # Names come from the data: what could steer a terminal is shown as its code.
            lines.append("".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line))
        return "\n".join(lines)

    def raise_any(self, heading: str) -> None:
        """Raise one PerPEFTError with every problem, if there are any."""
        if self:
            raise PerPEFTError(f"{heading}\n{self}")


def available_datasets(train_dir: Path) -> list[str]:
    """Names of the data sets whose `{name}_final.txt` lies in `train_dir`."""
    return sorted(path.name.removesuffix("_final.txt") for path in Path(train_dir).glob("*_final.txt"))


def is_dataset_name(name: str) -> bool:
    """Whether a name is one file name's beginning, and cannot lead into another folder."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def require_dataset(train_dir: str | Path, name: str) -> None:
    """Do nothing where the data set is there.

    Raises:
        PerPEFTError: it is not, and the text says how to get it; or the name could lead into another folder.
    """
    if not is_dataset_name(name):
        raise PerPEFTError(f"data set '{name}': a name is wanted, not a path; its folder goes into --train_dir")
    if not (Path(train_dir) / f"{name}_final.txt").is_file():
        raise _missing_dataset(Path(train_dir), name)


def _missing_dataset(train_dir: Path, name: str) -> PerPEFTError:
    here = ", ".join(available_datasets(train_dir)) or "none"
    where = f"data set '{name}' is not in {train_dir}: {name}_final.txt is missing (data sets there: {here})"
    if name in PAPER_DATASETS:
        return PerPEFTError(
            f"{where}. Download mmrec_datasets.zip by the link in README's section Data, then run python3 unzip_data.py."
        )
    return PerPEFTError(f"{where}. Write it as README's section Data describes, or name another by --dataset or --train_dir.")


def _read_pairs(path: Path, problems: Problems) -> np.ndarray:
    """The file's `user item` lines, [lines, 2]; malformed ones are noted and left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an empty file, or numbers that are no integers, are only warned about
        try:
            with path.open(encoding="utf-8-sig") as file:  # which leaves out the mark that some editors begin a file with
                pairs = np.loadtxt(file, dtype=np.int64, comments=None, ndmin=2)
            if pairs.shape[1] == 2 and (pairs >= 1).all():
                return pairs
        except (ValueError, OverflowError, Warning):
            pass  # the slow reading below says which lines are wrong
    pairs, malformed, below_one = [], [], []
    with path.open(encoding="utf-8-sig", errors="backslashreplace") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields:
                continue
            whole = len(fields) == 2 and all(re.fullmatch("[-+]?[0-9]{1,30}", field) for field in fields)
            user, item = map(int, fields) if whole else (0, 0)
            if not whole or max(user, item) > LARGEST_NUMBER:
                malformed.append(f"line {number} {line.strip()[:60]!r}")
            elif min(user, item) < 1:
                below_one.append(f"line {number} {line.strip()[:60]!r}")
            else:
                pairs.append((user, item))
    problems.add(f"lines of {path.name} that are not two integers", malformed)
    problems.add(f"lines of {path.name} with a number below 1", below_one)
    if not pairs and not problems:
        problems.add("empty file", [path.name])
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _read_dict(path: Path, problems: Problems) -> dict | None:
    """The dict in a pickle; None where there is none, which is noted."""
    try:
        value = load_pickle(path)
    except PerPEFTError as error:
        problems.add("unreadable file", [error])
        return None
    if not isinstance(value, dict):
        problems.add("file that holds no dict", [f"{path.name} (a {type(value).__name__})"])
        return None
    return value


def _is_encodable(text: str) -> bool:
    """Whether a text can be written at all: half of a surrogate pair, as careless cutting leaves it, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


can_name_a_image = is_raw_id  # until utils/prepare imports it by its new name


def _read_raw_ids(path: Path, bought: np.ndarray, problems: Problems) -> dict[int, str]:
    """Item numbers from 1, in order, and their raw ids."""
    table = _read_dict(path, problems)
    if not table:
        problems.add("empty file", [path.name] if table == {} else [])
        return {}
    usable = {}
    wrong = []
    for item, raw_id in table.items():
        plain_item = type(item) is int and 0 <= item <= LARGEST_NUMBER
        if plain_item and is_raw_id(raw_id):
            usable[item] = raw_id
        else:
            wrong.append(f"{_told(item)}: {_told(raw_id)}")
    problems.add(f"entries of {path.name} that are not item number: raw id ({RAW_ID_RULE})", wrong)
    usable.pop(0, None)  # some files name the padding item
    usable = dict(sorted(usable.items()))
    num_items = max(usable, default=0)
    # One stray huge number must not make a huge table, so no more gaps are looked for than are told.
    gaps = (item for item in itertools.count(1) if item not in usable)
    num_gaps = num_items - len(usable)
    told_gaps = itertools.islice(gaps, min(num_gaps, SHOWN_PROBLEMS))
    problems.add(f"gaps in the item numbers of {path.name}, which go up to {num_items}", told_gaps, num_gaps)
    problems.add(f"bought items without raw id in {path.name}", np.setdiff1d(bought, np.fromiter(usable, np.int64, len(usable))))
    seen: dict[str, int] = {}
    problems.add(
        f"duplicate raw ids in {path.name}",
        [f"{name} (items {seen[name]} and {item})" for item, name in usable.items() if seen.setdefault(name, item) != item],
    )
    return usable


def _read_titles(path: Path, raw_ids: list[str], problems: Problems, remarks: Problems) -> list[str]:
    """A title an item, MISSING_TITLE where there is none."""
    texts = _read_dict(path, problems)
    titles, missing, no_text = [], [], []
    for raw_id in raw_ids:
        title = None if texts is None else texts.get(raw_id)
        if isinstance(title, str) and title.strip():
            titles.append(title if _is_encodable(title) else title.encode(errors="replace").decode())
            continue
        titles.append(MISSING_TITLE)
        if title is None or isinstance(title, str) or (isinstance(title, float) and math.isnan(title)):
            missing.append(raw_id)
        else:
            no_text.append(f"{raw_id}: {_told(title)}")
    if texts is not None:
        remarks.add(f"items without a title, for which '{MISSING_TITLE}' stands in", missing)
        remarks.add(f"items whose title is no text, for which '{MISSING_TITLE}' stands in", no_text)
    return titles


def _find_images(
    images: Path, raw_ids: dict[int, str], missing_images: str, problems: Problems, remarks: Problems
) -> dict[int, str]:
    """The names of the image files that are there, by item; the others are noted."""
    try:
        with os.scandir(images) as entries:
            names = {entry.name for entry in entries}
    except OSError as error:
        problems.add("folder of images that cannot be read", [f"{images} ({error.strerror})"])
        return {}
    found = find_image_files(names, raw_ids)
    missing = [f"{image_file_name(raw_id)} (item {item})" for item, raw_id in raw_ids.items() if item not in found]
    if missing_images == "error":
        problems.add(f"items without an image in {images.name}/ (--missing_images blank goes on without them)", missing)
    else:
        remarks.add(BLANK_IMAGES, missing)
    return found


@dataclass
class Inspection:
    """A data set, and what is wrong with it.

    Attributes:
        dataset: what could be read; of use for training only if there are no problems.
        problems: what has to be mended.
        remarks: what is worth knowing, such as missing titles.
        present: the images whose files are there, by item number.
    """

    dataset: Dataset
    problems: Problems
    remarks: Problems
    present: dict[int, Path]

    def try_images(self, missing_images: str = "error") -> list[int]:
        """Decode every image that is there, on all cores, and note those that cannot be read.

        Args:
            missing_images: "error" where an unreadable image is a problem, "blank" where it is a remark.
        Returns:
            the items of the unreadable ones
        """
        paths = list(self.present.values())
        found = tqdm(on_all_cores(try_image, paths), "trying images", len(paths), unit="image", disable=None)
        wrong = {item: error for item, error in zip(self.present, found) if error is not None}
        told = [told_image(self.present[item], item, error) for item, error in wrong.items()]
        if missing_images == "error":
            self.problems.add(UNREADABLE_IMAGES, told)
        else:
            self.remarks.add(BLANK_IMAGES, told)
        return list(wrong)


def inspect_dataset(
    train_dir: str | Path, name: str, contents: bool = True, missing_images: str = "error", num_groups: int = 1
) -> Inspection:
    """Read a data set's files and gather what is wrong with them; images are looked for but not opened.

    Args:
        train_dir, name, contents, missing_images, num_groups: as in `read_dataset`.
    Raises:
        PerPEFTError: there is no such data set.
    """
    folder = Path(train_dir)
    final = folder / f"{name}_final.txt"
    require_dataset(folder, name)
    problems, remarks = Problems(), Problems()
    try:
        pairs = _read_pairs(final, problems)
    except OSError as error:
        raise PerPEFTError(f"{final} cannot be read ({error.strerror})") from error
    numbered = _read_raw_ids(folder / f"{name}_item2id_final.pickle", np.unique(pairs[:, 1]), problems)

    order = np.argsort(pairs[:, 0], kind="stable")
    user_ids, counts = np.unique(pairs[:, 0], return_counts=True)
    histories = Histories(pairs[order, 1], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    if len(counts) and counts.max() < 3:
        problems.add("no user with the 3 purchases that evaluation needs; most purchases of one user", [counts.max()])
    if 0 < len(counts) < num_groups:
        problems.add(f"fewer users than the {num_groups} groups of --C", [f"{len(counts)} users"])

    raw_ids = list(numbered.values())
    images = folder / f"{name}_images"
    paths = {item: images / image_file_name(raw_id) for item, raw_id in numbered.items()}
    titles, present = [MISSING_TITLE] * len(raw_ids), {}
    if contents:
        titles = _read_titles(folder / f"{name}_texts_final.pickle", raw_ids, problems, remarks)
        found = _find_images(images, numbered, missing_images, problems, remarks)
        paths |= {item: images / file_name for item, file_name in found.items()}
        present = {item: paths[item] for item in numbered if item in found}
    dataset = Dataset(
        name=name,
        folder=folder,
        user_ids=user_ids,
        histories=histories,
        raw_ids=raw_ids,
        titles=titles,
        image_paths=list(paths.values()),
        missing_titles=titles.count(MISSING_TITLE) if contents else 0,
    )
    return Inspection(dataset, problems, remarks, present)


def read_dataset(
    train_dir: str | Path, name: str, contents: bool = True, missing_images: str = "error", num_groups: int = 1
) -> Dataset:
    """Read a data set's histories, raw ids and titles, and look for its images; remarks go to stderr.

    Files, in `train_dir`: `{name}_final.txt` (lines `user item`, from 1, in time order), `{name}_item2id_final.pickle`
    (item to raw id), `{name}_texts_final.pickle` (raw id to title), `{name}_images/{raw id}.jpg`.

    Images are opened here only where something else is wrong, so that one report names everything; otherwise they are when
    the store is built.

    Args:
        train_dir: the folder of all data sets.
        name: the data set.
        contents: whether titles and images are needed; without, their absence is no error.
        missing_images: "error", or "blank" to let items without an image file pass.
        num_groups: how many groups the users will be put into (--C).
    Raises:
        PerPEFTError: all that is wrong with the files, the first ten of each kind and the counts.
    """
    found = inspect_dataset(train_dir, name, contents, missing_images, num_groups)
    if found.problems and found.present and missing_images == "error":
        found.try_images()
    if found.remarks:
        print(f"warning: data set '{name}':\n{found.remarks}", file=sys.stderr)
    found.problems.raise_any(f"data set '{name}' in {found.dataset.folder} cannot be used:")
    return found.dataset


def read_true_groups(dataset: Dataset) -> list[str] | None:
    """Each user's true group, in row order, where drawn data brings them in `{name}_true_groups.csv`; else None."""
    path = dataset.folder / f"{dataset.name}_true_groups.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            group_of = {row["user"]: row["group"] for row in csv.DictReader(file)}
        return [group_of[str(user)] for user in dataset.user_ids]
    except (OSError, KeyError, ValueError, csv.Error):  # nothing depends on it
        return None
