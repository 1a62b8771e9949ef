"""A shop's purchases and items from two CSV files, for data sets that are nobody else's."""
import collections
import csv
import datetime
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.common.errors import PerPEFTError
from utils.data.image_names import is_raw_id
from utils.data.problems import SHOWN_PROBLEMS, Problems
from utils.prepare.amazon import ItemText
from utils.prepare.interactions import key_of
from utils.prepare.titles import clean_title


class ShopTables:
    """Purchases (columns user, item, time) and items (columns item, title, image); other columns are passed over.

    Attributes:
        left_out: why items were left out, and how many.
        malformed: 0, since here a malformed line is an error.

    Raises:
        PerPEFTError: a file or column is missing, or the items' lines have mistakes.
    """

    malformed = 0

    def __init__(self, interactions: str | Path, items: str | Path):
        self._interactions = Path(interactions)
        if not self._interactions.is_file():
            raise PerPEFTError(f"{interactions} is no file")
        self.left_out: collections.Counter[str] = collections.Counter()
        self._items = {key_of(item.raw_id): item for item in self._read_items(Path(items))}
        if not self._items:
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self.left_out.items())
            raise PerPEFTError(f"{items} has no item with title and image ({reasons or 'it has no lines'})")

    def _read_items(self, path: Path) -> Iterator[ItemText]:
        problems = Problems()
        lines: dict[str, int] = {}
        for number, (raw_id, title, image) in _rows(path, ("item", "title", "image")):
            where = f"line {number}"
            title, file = clean_title(title), path.parent / image
            if not is_raw_id(raw_id):
                problems.add("item ids that are empty or hold a line break", [f"{where} {raw_id[:60]!r}"])
            elif lines.setdefault(raw_id, number) != number:
                problems.add("items that stand there twice", [f"{where} {raw_id!r} as line {lines[raw_id]}"])
            elif not title or not image:
                self.left_out["no image" if title else "no title"] += 1
            elif not _is_file(file):
                problems.add("image files that are missing", [f"{where} {image[:200]!r}"])
            else:
                yield ItemText(raw_id, title, str(file))
        problems.raise_any(f"{path} cannot be used:")

    def item_keys(self) -> np.ndarray:
        """The keys of the items that have all a data set needs."""
        return np.array(list(self._items), dtype=np.uint64)

    def purchases(self) -> Iterator[tuple[str, str, float]]:
        """User, item and time of every line; times are seconds since 1970 or whatever numbers the file holds.

        Raises:
            PerPEFTError: all lines that cannot be read, the first ten of each kind and the counts.
        """
        problems = Problems()
        kinds: dict[bool, str] = {}  # whether a time was a date, and where that kind was first met
        for number, (user, item, text) in tqdm(
            _rows(self._interactions, ("user", "item", "time")), self._interactions.name, unit="line", disable=None
        ):
            where = f"line {number}"
            time, is_date = _read_time(text)
            if not user or not item:
                problems.add("lines without user or item", [where])
            elif time is None:
                problems.add("times that are neither a number nor an ISO date", [f"{where} {text[:60]!r}"])
            else:
                kinds.setdefault(is_date, f"{where} {text[:60]!r}")
                yield user, item, time
        if len(kinds) == 2:
            problems.add("numbers as well as dates in the column time", kinds.values(), 1)
        problems.raise_any(f"{self._interactions} cannot be used:")

    def items(self, keys: np.ndarray) -> dict[int, ItemText]:
        """The items of some keys."""
        return {key: self._items[key] for key in keys.tolist()}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL in it
        return False


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Line number and values of some columns of a CSV file, without the space around them; blank lines are passed over.

    Raises:
        PerPEFTError: there is no such file or column, or it is no CSV file, or lines are too short.
    """
    problems = Problems()
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in columns if name not in header]
            if missing:
                found = ", ".join(header[:SHOWN_PROBLEMS])[:200] or "none"
                raise PerPEFTError(f"{path} lacks the columns {', '.join(missing)} (its first line names: {found})")
            places = [header.index(name) for name in columns]
            for row in reader:
                if row and len(row) <= max(places):
                    problems.add(f"lines with fewer than {max(places) + 1} columns", [f"line {reader.line_num}"])
                elif row:
                    yield reader.line_num, [row[place].strip() for place in places]
    except UnicodeDecodeError as error:
        raise PerPEFTError(f"{path} is no UTF-8 text ({error.reason}); save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise PerPEFTError(f"{path}, line {reader.line_num}: no CSV ({error})") from error
    except OSError as error:
        raise PerPEFTError(f"{path} cannot be read ({error.strerror})") from error
    problems.raise_any(f"{path} cannot be used:")


def _read_time(text: str) -> tuple[float | None, bool]:
    """A time and whether it was written as a date; None where it is neither number nor ISO date. Without zone it is UTC."""
    try:
        number = float(text)
        return (number if math.isfinite(number) else None), False
    except ValueError:
        pass
    try:
        date = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
        return (date if date.tzinfo else date.replace(tzinfo=datetime.timezone.utc)).timestamp(), True
    except (ValueError, OverflowError):
        return None, True
