"""Who bought what first, from streams longer than the memory: of an id nothing is kept but a 64-bit key."""
import hashlib
from array import array
from dataclasses import dataclass

import numpy as np

PARTS = 64  # users are dealt out by their keys' highest six bits, so that sorting needs little memory
WAITING = 1 << 16  # purchases that are looked up at once
SLICE = 1 << 20  # purchases that are counted at once


def key_of(identifier: str) -> int:
    """An id's key, the same in every process; two of 20 million ids get the same one with a chance of 1 in 100,000."""
    digest = hashlib.blake2b(identifier.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True)
class Purchases:
    """Purchases ordered by user and time.

    Attributes:
        users: a number a user, in ascending order, [purchases].
        items: places in the array of item keys, [purchases].
    """

    users: np.ndarray
    items: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def chosen(self, keep: np.ndarray) -> "Purchases":
        """Those for which `keep` [purchases] is true."""
        return Purchases(self.users[keep], self.items[keep])


class FirstPurchases:
    """Takes purchases in any order and gives each user's first of every item, in time order; ties stay as they came.

    Twenty bytes are held a purchase while they come, eight when `finish` has ended.

    Attributes:
        item_keys: the keys of the items that count, in ascending order.
        added, unknown, repeated: how many purchases came, were of other items, and were not the first of their item.
    """

    def __init__(self, item_keys: np.ndarray):
        self.item_keys = np.unique(np.asarray(item_keys, dtype=np.uint64))
        self.added = self.unknown = self.repeated = 0
        self._waiting = (array("Q"), array("Q"), array("d"))
        self._parts = [(array("Q"), array("I"), array("d")) for _ in range(PARTS)]

    def add(self, user: str, item: str, time: float) -> None:
        """Take one purchase; all times are of one unit."""
        for column, value in zip(self._waiting, (key_of(user), key_of(item), time)):
            column.append(value)
        if len(self._waiting[0]) == WAITING:
            self._deal_out()

    def _deal_out(self) -> None:
        users, items, times = map(np.array, self._waiting)  # copies, since an array that is looked at cannot be emptied
        for column in self._waiting:
            del column[:]
        places = np.searchsorted(self.item_keys, items)
        known = self.item_keys.take(places, mode="clip") == items
        self.added += len(users)
        self.unknown += int((~known).sum())
        parts = (users >> np.uint64(58)).astype(np.uint8)
        order = np.flatnonzero(known)
        order = order[np.argsort(parts[order], kind="stable")]
        ends = np.searchsorted(parts[order], np.arange(1, PARTS))
        for column, values in enumerate((users, places.astype(np.uint32), times)):
            for part, mine in zip(self._parts, np.split(values[order], ends)):
                part[column].frombytes(mine.tobytes())

    def finish(self) -> Purchases:
        """All first purchases; users are numbered from 0 in the order of their keys. To be called once."""
        self._deal_out()
        self._waiting = ()
        taken = sum(len(users) for users, _, _ in self._parts)
        all_users, all_items = np.empty(taken, dtype=np.uint32), np.empty(taken, dtype=np.uint32)
        num_users = end = 0
        while self._parts:
            users, items, times = map(np.asarray, self._parts.pop(0))
            first = _first_in_time(users, items, times)
            found, rows = np.unique(users[first], return_inverse=True)
            start, end = end, end + len(first)
            all_users[start:end] = rows + num_users
            all_items[start:end] = items[first]
            num_users += len(found)
        self.repeated = taken - end
        return Purchases(all_users[:end], all_items[:end])


def _first_in_time(users: np.ndarray, items: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Rows of each user's first purchase of every item, by user and time, all three [purchases]; ties by row."""
    order = np.lexsort((times, items, users))  # stable
    other = np.ones(len(order), dtype=bool)
    other[1:] = (np.diff(users[order]) != 0) | (np.diff(items[order]) != 0)
    first = np.sort(order[other])
    return first[np.lexsort((times[first], users[first]))]


def count_each(numbers: np.ndarray) -> np.ndarray:
    """How often each number from 0 to the largest occurs; `np.bincount`, which copies all numbers, slice by slice."""
    counts = np.zeros(int(numbers.max(initial=0)) + 1, dtype=np.int32)
    for start in range(0, len(numbers), SLICE):
        piece = numbers[start : start + SLICE]
        lowest = piece.min()
        found = np.bincount(piece - lowest)
        counts[lowest : lowest + len(found)] += found.astype(np.int32)
    return counts


def core_of(purchases: Purchases, core: int) -> Purchases:
    """The largest part in which every user and every item has at least `core` purchases; the order stays."""
    while True:
        keep = (count_each(purchases.users) >= core)[purchases.users]
        keep &= (count_each(purchases.items) >= core)[purchases.items]
        if keep.all():
            return purchases
        purchases = purchases.chosen(keep)


def sample_users(purchases: Purchases, count: int, core: int, seed: int) -> Purchases:
    """The purchases of `count` users drawn by `seed` from those with at least `core`; of all of them where they are fewer."""
    counts = count_each(purchases.users)
    candidates = np.flatnonzero(counts >= core)
    if len(candidates) > count:
        candidates = np.random.default_rng(seed).choice(candidates, count, replace=False)
    drawn = np.zeros(len(counts), dtype=bool)
    drawn[candidates] = True
    return purchases.chosen(drawn[purchases.users])
