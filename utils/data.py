"""A data set from its files: purchase histories, raw ids, titles, picture paths, and the leave-last-out split."""
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.errors import PerPEFTError
from utils.safe_pickle import load_pickle

MISSING_TITLE = "No description available."
PAPER_DATASETS = ("sports_outdoors", "toys_games", "beauty_care", "arts")
SHOWN_PROBLEMS = 10


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
        image_paths: pictures, which need not have been looked at yet.
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


class Problems:
    """Everything wrong with a data set, gathered so that it is reported at once."""

    def __init__(self):
        self._kinds: dict[str, list[str]] = {}

    def add(self, kind: str, examples: Iterable[object]) -> None:
        """Note that something is wrong in one way with each of `examples`; no examples, no problem."""
        examples = [str(example) for example in examples]
        if examples:
            self._kinds.setdefault(kind, []).extend(examples)

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def __str__(self) -> str:
        lines = []
        for kind, examples in self._kinds.items():
            more = f" and {len(examples) - SHOWN_PROBLEMS} more" if len(examples) > SHOWN_PROBLEMS else ""
            lines.append(f"  {kind} ({len(examples)}): {', '.join(examples[:SHOWN_PROBLEMS])}{more}")
        return "\n".join(lines)

    def raise_any(self, heading: str) -> None:
        """Raise one PerPEFTError with every problem, if there are any."""
        if self:
            raise PerPEFTError(f"{heading}\n{self}")


def available_datasets(train_dir: Path) -> list[str]:
    """Names of the data sets whose `{name}_final.txt` lies in `train_dir`."""
    return sorted(path.name.removesuffix("_final.txt") for path in Path(train_dir).glob("*_final.txt"))


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
            pairs = np.loadtxt(path, dtype=np.int64, comments=None, ndmin=2, encoding="utf-8")
            if pairs.shape[1] == 2 and (pairs >= 1).all():
                return pairs
        except (ValueError, OverflowError, Warning):
            pass  # the slow reading below says which lines are wrong
    pairs, malformed, below_one = [], [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields:
                continue
            if len(fields) != 2 or not all(field.lstrip(b"-").isdigit() and len(field) < 19 for field in fields):
                malformed.append(f"line {number} {line.strip()[:60].decode('utf-8', 'backslashreplace')!r}")
            elif int(fields[0]) < 1 or int(fields[1]) < 1:
                below_one.append(f"line {number} {line.strip()[:60].decode()!r}")
            else:
                pairs.append((int(fields[0]), int(fields[1])))
    problems.add(f"lines of {path.name} that are not two integers", malformed)
    problems.add(f"lines of {path.name} with a number below 1", below_one)
    if not pairs and not problems:
        problems.add("empty file", [path.name])
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _read_dict(path: Path, problems: Problems) -> dict:
    try:
        value = load_pickle(path)
    except PerPEFTError as error:
        problems.add("unreadable file", [error])
        return {}
    if not isinstance(value, dict):
        problems.add("file that holds no dict", [f"{path.name} (a {type(value).__name__})"])
        return {}
    return value


def _read_raw_ids(path: Path, bought: np.ndarray, problems: Problems) -> list[str]:
    table = _read_dict(path, problems)
    if not table:
        if not problems:
            problems.add("empty file", [path.name])
        return []
    usable = {}
    wrong = []
    for item, raw_id in table.items():
        plain_item = isinstance(item, int) and not isinstance(item, bool) and item >= 0
        # A raw id becomes a file name, so it must not be able to name another folder.
        if plain_item and isinstance(raw_id, str) and raw_id and not set(raw_id) & set("/\\\0"):
            usable[item] = raw_id
        else:
            wrong.append(f"{item!r}: {raw_id!r}"[:80])
    problems.add(f"entries of {path.name} that are not item number: raw id", wrong)
    usable.pop(0, None)  # some files name the padding item
    num_items = max(usable, default=0)
    if num_items > 2 * len(usable) + int(bought.max(initial=0)):  # a stray huge index must not make a huge table
        problems.add(f"item numbers of {path.name} far above the number of its items", [num_items])
        return []
    problems.add(f"gaps in the item numbers of {path.name}", sorted(set(range(1, num_items + 1)) - usable.keys()))
    problems.add(f"bought items without raw id in {path.name}", np.setdiff1d(bought, np.fromiter(usable, np.int64, len(usable))))
    seen: dict[str, int] = {}
    problems.add(
        f"duplicate raw ids in {path.name}",
        [f"{name} (items {seen[name]} and {item})" for item, name in usable.items() if seen.setdefault(name, item) != item],
    )
    return [usable.get(item, "") for item in range(1, num_items + 1)]


def read_dataset(train_dir: str | Path, name: str, contents: bool = True, missing_images: str = "error") -> Dataset:
    """Read a data set's histories, raw ids and titles, and look for its pictures.

    Files, in `train_dir`: `{name}_final.txt` (lines `user item`, from 1, in time order), `{name}_item2id_final.pickle`
    (item to raw id), `{name}_texts_final.pickle` (raw id to title), `{name}_images/{raw id}.jpg`.

    Args:
        train_dir: the folder of all data sets.
        name: the data set.
        contents: whether titles and pictures are needed; without, their absence is no error.
        missing_images: "error", or "blank" to let items without a picture file pass.
    Raises:
        PerPEFTError: all that is wrong with the files, the first ten of each kind and the counts.
    """
    folder = Path(train_dir)
    final = folder / f"{name}_final.txt"
    if not final.is_file():
        raise _missing_dataset(folder, name)
    problems = Problems()
    pairs = _read_pairs(final, problems)
    raw_ids = _read_raw_ids(folder / f"{name}_item2id_final.pickle", np.unique(pairs[:, 1]), problems)

    order = np.argsort(pairs[:, 0], kind="stable")
    user_ids, counts = np.unique(pairs[:, 0], return_counts=True)
    histories = Histories(pairs[order, 1], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    if len(counts) and counts.max() < 3:
        problems.add("no user with the 3 purchases that evaluation needs; most purchases of one user", [counts.max()])

    images = folder / f"{name}_images"
    titles, missing_titles = [MISSING_TITLE] * len(raw_ids), 0
    if contents:
        texts = _read_dict(folder / f"{name}_texts_final.pickle", problems)
        found = [texts.get(raw_id) for raw_id in raw_ids]
        titles = [title if isinstance(title, str) and title.strip() else MISSING_TITLE for title in found]
        missing_titles = titles.count(MISSING_TITLE)
        if not images.is_dir():
            problems.add("missing folder of pictures", [images])
        elif missing_images == "error":
            with os.scandir(images) as entries:
                present = {entry.name for entry in entries}
            problems.add(
                f"items without a picture in {images.name}/ (--missing_images blank goes on without them)",
                [f"{raw_id}.jpg (item {item})" for item, raw_id in enumerate(raw_ids, 1) if f"{raw_id}.jpg" not in present],
            )
    problems.raise_any(f"data set '{name}' in {folder} cannot be used:")
    return Dataset(
        name=name,
        folder=folder,
        user_ids=user_ids,
        histories=histories,
        raw_ids=raw_ids,
        titles=titles,
        image_paths=[images / f"{raw_id}.jpg" for raw_id in raw_ids],
        missing_titles=missing_titles,
    )
