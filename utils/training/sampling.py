"""Training batches: users of one group, their transitions, and negatives; whole arrays at a time."""
from dataclasses import dataclass, replace

import numpy as np
import torch

from utils.common.devices import to_device
from utils.common.errors import PerPEFTError
from utils.data.histories import Histories, sorted_distinct

Array = np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Batch:
    """What one training step needs; sequences hold row numbers of the batch's own small item table."""

    group: int  # whose adapter and projector are trained
    items: Array  # the distinct items of the batch, [rows]; row 0 is the padding item 0
    seq: Array  # rows of `items`, 0 at padding, [batch, time], as are the next two
    positives: Array
    negatives: Array
    num_transitions: int  # real positions of `seq`; in a shard, those of the full batch

    def shard(self, rank: int, ranks: int) -> "Batch":
        """Every `ranks`-th user from number `rank` on, with these users' own items.

        A rank that has no user gets one without a transition and one item, since every rank has to take part in a step.
        """
        if ranks == 1:
            return self
        if rank >= len(self.seq):
            padding = np.zeros_like(self.seq[:1])
            return replace(self, items=self.items[:2], seq=padding, positives=padding, negatives=padding)
        tables = np.stack([self.seq, self.positives, self.negatives])[:, rank::ranks]  # [3, users, time]
        rows, local = np.unique(np.append(tables.ravel(), 0), return_inverse=True)  # row 0 stays the padding item's
        seq, positives, negatives = local[:-1].reshape(tables.shape)
        return replace(self, items=self.items[rows], seq=seq, positives=positives, negatives=negatives)

    def to(self, device: torch.device) -> "Batch":
        """The same with tensors on a device in place of arrays."""
        tables = {name: to_device(getattr(self, name), device) for name in ("items", "seq", "positives", "negatives")}
        return replace(self, **tables)


class Sampler:
    """Batches of one stage. Every draw is a function of (seed, epoch, step) alone, so any step can be repeated.

    An epoch has ceil(users of g / batch_size) batches of every group g, in shuffled order, and meets every user once.
    Left out are users with fewer than two training interactions, who have no transition to learn, and users whose training
    history holds every item, who have no possible negative.

    Args:
        train: training histories, of items 1..num_items.
        groups: each user row's group, [users].
        candidates: for each group the items that negatives are drawn from.
        batch_size, maxlen: users per batch, and the last transitions per user.
        seed: any number of integers that make this sampler's draws its own.
        mixed: whether each negative comes from all items, not from the candidates, with probability 1/2 (not the paper's).
    """

    def __init__(
        self, train: Histories, num_items: int, groups: np.ndarray, candidates: list[np.ndarray],
        batch_size: int, maxlen: int, seed: tuple[int, ...], mixed: bool = False,
    ):  # fmt: skip
        self._train, self._num_items, self._candidates = train, num_items, candidates
        self._batch_size, self._maxlen, self._seed, self._mixed = batch_size, maxlen, seed, mixed
        self._interactions = sorted_distinct(train.users * (num_items + 1) + train.items)  # one number each
        trainable = (train.lengths >= 2) & ~train.has_every_item(num_items)
        self._members = [np.flatnonzero(trainable & (groups == group)) for group in range(len(candidates))]
        self.num_batches = sum(-(-len(members) // batch_size) for members in self._members)
        if not self.num_batches:
            raise PerPEFTError(
                "no user left to train on: training needs users with two training interactions (four in all) whose training "
                "history does not hold every item"
            )
        self._plans: dict[int, list[tuple[int, np.ndarray]]] = {}  # of the latest epoch

    def plan(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """The group and the user rows of every batch of an epoch."""
        if epoch not in self._plans:
            random = np.random.default_rng([*self._seed, epoch, 0])  # of the plan; `batch` has step + 1
            batches = []
            for group, members in enumerate(self._members):
                shuffled = random.permutation(members)
                starts = range(0, len(shuffled), self._batch_size)
                batches.extend((group, shuffled[start : start + self._batch_size]) for start in starts)
            self._plans = {epoch: [batches[position] for position in random.permutation(len(batches))]}
        return self._plans[epoch]

    def batch(self, epoch: int, step: int) -> Batch:
        """The batch of one step of an epoch."""
        group, users = self.plan(epoch)[step]
        window = self._train.last(users, self._maxlen + 1)  # [batch, time + 1]
        seq = window[:, :-1]  # [batch, time]
        mask = seq != 0
        positives = np.where(mask, window[:, 1:], 0)  # [batch, time]
        negatives = np.zeros_like(seq)  # [batch, time]
        random = np.random.default_rng([*self._seed, epoch, step + 1])
        negatives[mask] = self.negatives(np.repeat(users, mask.sum(1)), group, random)
        rows = np.concatenate([[0], seq.ravel(), positives.ravel(), negatives.ravel()])
        items, local = np.unique(rows, return_inverse=True)
        seq, positives, negatives = local[1:].reshape(3, *seq.shape)
        return Batch(group, items, seq, positives, negatives, num_transitions=int(mask.sum()))

    def negatives(self, users: np.ndarray, group: int, random: np.random.Generator) -> np.ndarray:
        """An item for each of `users` that they do not have in training: one of the group's candidates, or as `mixed` says."""
        drawn = self._draw(users, self._candidates[group], random)
        if self._mixed:
            from_all = np.flatnonzero(random.random(len(drawn)) < 0.5)
            drawn[from_all] = self._draw(users[from_all], np.arange(1, self._num_items + 1), random)
        return drawn

    def _draw(self, users: np.ndarray, candidates: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Uniform draws from the candidates that each user does not have in training, [len(users)]."""
        drawn = candidates[random.integers(len(candidates), size=users.shape)]
        open_positions = np.flatnonzero(self._in_history(users, drawn))
        for _ in range(20):  # with half of the candidates in the history, one draw in a million is still open after this
            if not len(open_positions):
                return drawn
            drawn[open_positions] = candidates[random.integers(len(candidates), size=len(open_positions))]
            open_positions = open_positions[self._in_history(users[open_positions], drawn[open_positions])]
        for position in open_positions:  # users with nearly all items: draw from the others
            history = self._train[users[position]]
            left = np.setdiff1d(candidates, history)
            if not len(left):  # the user has all items of the group: any other item will do
                left = np.setdiff1d(np.arange(1, self._num_items + 1), history)
            drawn[position] = random.choice(left)
        return drawn

    def _in_history(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Whether users[i] has items[i] in training, by one binary search for all."""
        keys = users * (self._num_items + 1) + items
        return self._interactions.take(np.searchsorted(self._interactions, keys), mode="clip") == keys


def group_items(train: Histories, groups: np.ndarray, num_groups: int) -> list[np.ndarray]:
    """For each group the distinct items in its users' training histories; empty groups get none."""
    group_of_interaction = groups[train.users]
    return [sorted_distinct(train.items[group_of_interaction == group]) for group in range(num_groups)]
