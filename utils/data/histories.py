"""Interaction histories as flat arrays, and the leave-last-out split."""
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

FEWEST_INTERACTIONS = 3  # of a user who is evaluated: one to train on, one to validate, one to test


def sorted_distinct(values: np.ndarray) -> np.ndarray:
    """As np.unique, which hashes since numpy 2.3 and is then slower by a factor of thirty for millions of integers."""
    values = np.sort(values)
    return values[np.diff(values, prepend=values[:1] - 1) != 0]


@dataclass(frozen=True)
class Histories:
    """Every user's items in time order, concatenated into one array.

    Attributes:
        items: item numbers from 1, [interactions].
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
        """The user row of every interaction, [interactions]."""
        return np.repeat(np.arange(self.num_users), self.lengths)

    def __getitem__(self, user: int) -> np.ndarray:
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def shortened(self, lengths: np.ndarray) -> "Histories":
        """The first `lengths[u]` items of every user, lengths [users]."""
        keep = np.arange(len(self.items)) < np.repeat(self.offsets[:-1] + lengths, self.lengths)
        return Histories(self.items[keep], np.concatenate([[0], np.cumsum(lengths)]))

    def last(self, users: np.ndarray, count: int) -> np.ndarray:
        """The last `count` items of the given user rows, left-padded with 0, [len(users), count]."""
        column = self.offsets[users + 1][:, None] + np.arange(-count, 0)  # [users, count]
        mask = column >= self.offsets[users][:, None]
        return np.where(mask, self.items[np.where(mask, column, 0)] if len(self.items) else 0, 0)

    def has_every_item(self, num_items: int) -> np.ndarray:
        """Whether each user has all of the items 1..num_items, [users]."""
        every = self.lengths >= num_items
        for user in np.flatnonzero(every):
            every[user] = len(np.unique(self[user])) == num_items
        return every

    @classmethod
    def of_lists(cls, lists: Iterable[Iterable[int]]) -> "Histories":
        """Histories from one list of items per user."""
        arrays = [np.asarray(list(items), dtype=np.int64) for items in lists]
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, np.int64), *arrays]), offsets)


@dataclass(frozen=True)
class Split:
    """Leave-last-out: last item test, last but one valid, the rest train; histories under 3 interactions are all train.

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
    """Split every history with 3 or more interactions into train, valid (last but one) and test (last)."""
    lengths = histories.lengths
    held_out = lengths >= FEWEST_INTERACTIONS
    valid, test = np.zeros((2, len(lengths)), dtype=np.int64)
    ends = histories.offsets[1:][held_out]
    valid[held_out], test[held_out] = histories.items[ends - 2], histories.items[ends - 1]
    return Split(histories.shortened(lengths - 2 * held_out), histories.shortened(lengths - held_out), valid, test)
