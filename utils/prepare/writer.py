"""A data set's files from what a shop has: first purchases in time order, the core, titles, images; the rest is told."""
import argparse
import csv
import pickle
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock, Timeout

from utils.common.console import number
from utils.common.errors import PerPEFTError
from utils.common.files import write_atomically
from utils.data.dataset import is_dataset_name
from utils.prepare.amazon import ItemText
from utils.prepare.image_folder import Filling, fill_folder
from utils.prepare.interactions import FirstPurchases, Purchases, core_of, count_each, sample_users

LONGEST_NAME = 200  # bytes of a data set's name: the longest ending and a temporary one must fit behind it
EVALUATED = 3  # purchases without which a user is never evaluated
GROUPS = 8  # --C of the training scripts
LINES = 100_000  # of {name}_final.txt that are written at once


class Shop(Protocol):
    """Where purchases and items come from.

    Attributes:
        left_out: why items were left out, and how many.
        malformed: how many lines of purchases could not be read.
    """

    left_out: dict[str, int]
    malformed: int

    def item_keys(self) -> np.ndarray:
        """The keys of the items with an id, a title and an image that can be used."""

    def purchases(self) -> Iterator[tuple[str, str, float]]:
        """User, item and time of every purchase."""

    def items(self, keys: np.ndarray) -> dict[int, ItemText]:
        """The items of some keys."""


@dataclass(frozen=True)
class Target:
    """What is to be made.

    Attributes:
        name, train_dir: of the data set.
        core: how many purchases every user and every item must have.
        max_users, seed: how many users are drawn at most, and the seed for it; None draws none.
        restart: whether a data set of that name may be replaced.
    """

    name: str
    train_dir: Path
    core: int = 5
    max_users: int | None = None
    seed: int = 0
    restart: bool = False

    def file(self, ending: str) -> Path:
        """One of the data set's files."""
        return self.train_dir / f"{self.name}{ending}"


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """The options that `target_of` reads."""
    parser.add_argument("--name", required=True, help="name of the data set to make")
    parser.add_argument("--train_dir", type=Path, default=Path("./dataset"), help="folder of the data sets")
    parser.add_argument(
        "--core", type=number(int, 1), default=5, help="purchases that every user and item kept must have; 1 keeps all"
    )
    parser.add_argument(
        "--max_users",
        type=number(int, 1, 2**31),
        default=None,
        help="a seeded random sample of so many of the users with --core purchases, taken before the core is formed, so that "
        "fewer remain (default: all)",
    )
    parser.add_argument("--seed", type=number(int, 0, 2**31), default=0, help="of --max_users")
    parser.add_argument("--restart", action="store_true", help="replace a data set of that name; its images stay")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def target_of(options: argparse.Namespace) -> Target:
    """What the options ask for."""
    return Target(options.name, options.train_dir, options.core, options.max_users, options.seed, options.restart)


def prepare(
    target: Target,
    shop: Shop,
    get: Callable[[str], bytes],
    workers: int,
    stop: Callable[[], None] = lambda: None,
    give_up: int = 0,
) -> str:
    """Make a data set; `{name}_final.txt` comes last, so that without it nothing counts as made.

    Items whose image cannot be had are left out and the core is formed anew. Interrupted, the same call goes on: images
    that are there stay.

    Args:
        target: what is to be made.
        shop: what it is made from.
        get, workers, stop, give_up: as in `utils.prepare.image_folder.fill_folder`.
    Returns:
        what was read, what was left out and why, what remained, and how to go on; for people.
    Raises:
        PerPEFTError: the name cannot be used or is in use, nothing is left, or no image could be had.
    """
    _require_name(target)
    target.train_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(target.train_dir / f".{target.name}_prepare.lock", timeout=0):
            return _prepare(target, shop, get, workers, stop, give_up)
    except Timeout:
        raise PerPEFTError(f"another process is making data set '{target.name}' in {target.train_dir}") from None


def _require_name(target: Target) -> None:
    if not is_dataset_name(target.name) or len(target.name.encode(errors="replace")) > LONGEST_NAME:
        raise PerPEFTError(f"data set '{target.name[:60]}': a short name is wanted, not a path; its folder goes into --train_dir")
    if target.name == "demo":
        raise PerPEFTError("'demo' is the data set that the training scripts draw themselves; choose another --name")
    if target.file("_final.txt").exists() and not target.restart:
        raise PerPEFTError(f"{target.file('_final.txt')} is there already; choose another --name, or replace it by --restart")


def _prepare(
    target: Target, shop: Shop, get: Callable[[str], bytes], workers: int, stop: Callable[[], None], give_up: int
) -> str:
    counts = {}
    first = FirstPurchases(shop.item_keys())
    for user, item, time in shop.purchases():
        first.add(user, item, time)
    purchases = first.finish()
    counts["read"] = first.added + shop.malformed
    counts["malformed"] = shop.malformed
    counts["of an item that is unknown or left out"] = first.unknown
    counts["of an item the user had bought before"] = first.repeated
    if not len(purchases):
        raise PerPEFTError(f"none of {counts['read']:,} purchases is of an item that can be used; do both files fit together?")
    if target.max_users is not None:
        drawn = sample_users(purchases, target.max_users, target.core, target.seed)
        counts["of users not drawn"] = len(purchases) - len(drawn)
        purchases = drawn
    core = core_of(purchases, target.core)
    counts[f"outside the {target.core}-core"] = len(purchases) - len(core)
    _require_enough(core, target, "")
    del purchases

    items = shop.items(first.item_keys[np.flatnonzero(count_each(core.items))])
    filling = _fetch(target, items, get, workers, stop, give_up)
    failed = np.array([key for key, item in items.items() if item.raw_id in filling.failed], dtype=np.uint64)
    left = core_of(core.chosen(~np.isin(first.item_keys, failed)[core.items]), target.core)
    counts["of items whose image failed, and what left the core with them"] = len(core) - len(left)
    _require_enough(left, target, f" once {len(failed):,} items without image are left out")
    counts["kept"] = len(left)

    _write(target, left, first.item_keys, items)
    return _summary(target, left, counts, shop.left_out, filling)


def _require_enough(purchases: Purchases, target: Target, when: str) -> None:
    if not len(purchases):
        more_users = "" if target.max_users is None else " or raise --max_users"
        raise PerPEFTError(f"no user and no item has {target.core} purchases{when}; lower --core{more_users}")
    if count_each(purchases.users).max() < EVALUATED:
        raise PerPEFTError(f"no user has the {EVALUATED} purchases that evaluation needs{when}")


def _fetch(
    target: Target,
    items: dict[int, ItemText],
    get: Callable[[str], bytes],
    workers: int,
    stop: Callable[[], None],
    give_up: int,
) -> Filling:
    """Fill the folder of images and write down what failed."""
    folder = target.file("_images")
    sources = {item.raw_id: item.image for item in items.values()}
    try:
        filling = fill_folder(folder, sources, get, workers, stop, give_up)
    except (KeyboardInterrupt, OSError) as error:
        error.saved = f"the images so far are in {folder}"  # which utils.run.options.run_main tells
        raise
    failures = target.file("_failed_images.csv")
    failures.unlink(missing_ok=True)
    if filling.failed:
        write_atomically(failures, lambda path: _write_failures(path, sources, filling.failed))
    if len(filling.failed) == len(sources):
        reason = next(iter(filling.failed.values()))
        raise PerPEFTError(f"none of the {len(sources):,} images could be had (the first: {reason}); see {failures}")
    return filling


def _write_failures(path: Path, sources: dict[str, str], failed: dict[str, str]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("raw_id", "source", "reason"))
        writer.writerows((raw_id, sources[raw_id], reason) for raw_id, reason in sorted(failed.items()))


def _write(target: Target, purchases: Purchases, item_keys: np.ndarray, items: dict[int, ItemText]) -> None:
    """Number users and items from 1, items in the order of their raw ids, and write the three files."""
    places = np.flatnonzero(count_each(purchases.items))
    kept = [items[key] for key in item_keys[places].tolist()]
    in_order = sorted(range(len(kept)), key=lambda row: kept[row].raw_id)
    item_numbers = np.zeros(len(item_keys), dtype=np.int64)
    item_numbers[places[in_order]] = np.arange(1, len(kept) + 1)
    user_numbers = np.cumsum(count_each(purchases.users) > 0)

    def write_lines(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for start in range(0, len(purchases), LINES):
                users = user_numbers[purchases.users[start : start + LINES]]
                bought = item_numbers[purchases.items[start : start + LINES]]
                file.writelines(f"{user} {item}\n" for user, item in zip(users.tolist(), bought.tolist()))

    for ending in ("_final.txt", "_preX.pt", "_preX.json"):  # from here on an old data set is being replaced
        target.file(ending).unlink(missing_ok=True)
    raw_ids = {item: kept[row].raw_id for item, row in enumerate(in_order, 1)}
    titles = {kept[row].raw_id: kept[row].title for row in in_order}
    for ending, value in (("_item2id_final.pickle", raw_ids), ("_texts_final.pickle", titles)):
        write_atomically(target.file(ending), lambda path, value=value: path.write_bytes(pickle.dumps(value)))
    write_atomically(target.file("_final.txt"), write_lines)


def _summary(target: Target, purchases: Purchases, counts: dict[str, int], left_out: dict[str, int], filling: Filling) -> str:
    """A table of what was read, left out and kept, and the next command."""
    num_users, num_items = (int(np.count_nonzero(count_each(numbers))) for numbers in (purchases.users, purchases.items))
    parts = [
        ("items left out", left_out),
        ("purchases", counts),
        ("images", {"fetched": filling.fetched, "there already": filling.kept, "failed": len(filling.failed)}),
        (f"data set '{target.name}'", {"users": num_users, "items": num_items, "interactions": len(purchases)}),
    ]
    lines = []
    for heading, rows in parts:
        lines += [heading, *(f"  {what:<64}{count:>14,}" for what, count in rows.items())] if rows else []
    if filling.failed:
        lines.append(f"Which images failed and why is in {target.file('_failed_images.csv')}; their items are left out.")
    command = ["python3", "-m", "scripts.check_data", "--dataset", target.name, "--train_dir", str(target.train_dir)]
    command += ["--C", str(num_users)] if num_users < GROUPS else []
    return "\n".join([*lines, f"Next: {shlex.join(command)}"])
