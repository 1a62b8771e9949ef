"""Full-ranking evaluation: every item encoded once a group, every user's held-out item ranked against all others."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from models import PerPEFT, SASRec
from utils.common.devices import to_device
from utils.data.histories import Histories, Split
from utils.items.source import ItemSource

SPLITS = ("valid", "test")
METRICS = tuple(f"{name}@{k}" for name in ("HR", "NDCG") for k in (10, 20, 30))
ITEMS_AT_ONCE = 256  # encoded in a forward pass
USERS_AT_ONCE = 8192  # whose histories are read in a forward pass
SCORES_AT_ONCE = 2**24  # entries of a score matrix held at a time: memory stays flat in the number of users


def user_values(metric: str, ranks: np.ndarray) -> np.ndarray:
    """Each user's HR@K (1 if rank < K, else 0) or NDCG@K (1 / log2(rank + 2) if rank < K, else 0), of ranks from 0, [users]."""
    kind, cutoff = metric.split("@")
    hits = (ranks < int(cutoff)).astype(float)
    return hits if kind == "HR" else hits / np.log2(ranks + 2.0)


@dataclass(frozen=True)
class Ranks:
    """Ranks from 0 of every evaluated user's held-out items."""

    users: np.ndarray  # rows of the evaluated users, [users]
    valid: np.ndarray  # ranks of their validation items, [users]
    test: np.ndarray  # ranks of their test items, [users]

    def metrics(self) -> dict[str, float]:
        """`valid_HR@10` ... `test_NDCG@30`, means over users, as fractions."""
        return {f"{split}_{name}": float(user_values(name, getattr(self, split)).mean()) for split in SPLITS for name in METRICS}


class Evaluator:
    """Ranks all users of one data set with models on one device; several processes share the work, and each gets every result."""

    def __init__(self, split: Split, source: ItemSource, device: torch.device, accelerator: Accelerator):
        self.split, self.source, self.device, self._accelerator = split, source, device, accelerator

    @torch.no_grad()
    def item_table(self, model: PerPEFT, group: int) -> Tensor:
        """The e_i of all items by a group's adapter and projector, [num_items + 1, hidden]; row 0 is the padding item's."""
        model.eval()
        vectors = torch.zeros(self.source.num_items + 1, model.sasrec.hidden_units, device=self.device)
        order = self.source.reading_order()
        for start in self._own_share(range(0, len(order), ITEMS_AT_ONCE)):
            items = order[start : start + ITEMS_AT_ONCE]
            chunk = model.item_vectors(group, self.source.fetch(items, self.device))  # [1 + items, hidden]
            vectors[to_device(items, self.device)] = chunk[1:]
            if start == 0:  # every chunk has the padding item's vector, but the sum over ranks must hold it once
                vectors[0] = chunk[0]
        return model.sasrec.item_inputs(self._accelerator.reduce(vectors, "sum"))

    @torch.no_grad()
    def ranks(self, model: PerPEFT, groups: np.ndarray) -> Ranks:
        """Rank every evaluated user's valid and test item by a model; each user row is in its group, [users]."""
        split, users = self.split, self.split.evaluated_users
        ranks = torch.zeros(2, len(users), dtype=torch.long, device=self.device)  # valid, test
        held_out = ((split.train, split.valid), (split.train_and_valid, split.test))
        for group in np.unique(groups[users]).tolist():
            table = self.item_table(model, group)
            places = self._own_share(np.flatnonzero(groups[users] == group))
            members, on_device = users[places], to_device(places, self.device)
            for row, (histories, targets) in enumerate(held_out):
                states = last_states(model.sasrec, table, histories, members)
                ranks[row, on_device] = rank_targets(states, table, targets[members], histories, members)
        return Ranks(users, *self._accelerator.reduce(ranks, "sum").cpu().numpy())

    def _own_share(self, work: Sequence) -> Sequence:
        return work[self._accelerator.process_index :: self._accelerator.num_processes]


@torch.no_grad()
def last_states(sasrec: SASRec, item_table: Tensor, histories: Histories, users: np.ndarray) -> Tensor:
    """A recommender's state, in eval mode, after the last interaction of some rows of `histories`, [users, hidden].

    `item_table` holds the e_i, [num_items + 1, hidden].
    """
    chunks = [item_table.new_empty(0, item_table.shape[1])]
    for start in range(0, len(users), USERS_AT_ONCE):
        seq = histories.last(users[start : start + USERS_AT_ONCE], sasrec.maxlen)  # [users, time]
        states = sasrec.states_from_inputs(to_device(seq, item_table.device), item_table)  # [users, time, hidden]
        chunks.append(states[:, -1])
    return torch.cat(chunks)


@torch.no_grad()
def rank_targets(states: Tensor, item_table: Tensor, targets: np.ndarray, excluded: Histories, users: np.ndarray) -> Tensor:
    """Ranks from 0, [users]: how many other candidates score at least as high as the target; NaN counts against the model.

    Args:
        states: last states of the users, [users, hidden].
        item_table: the e_i, [num_items + 1, hidden].
        targets: each user's held-out item, [users].
        excluded: the items that are no candidates for a user (the target itself always is one).
        users: the users' rows in `excluded`, [users].
    """
    num_rows, device = item_table.shape[0], item_table.device
    users_at_once = max(1, SCORES_AT_ONCE // num_rows)
    ranks = [torch.empty(0, dtype=torch.long, device=device)]
    for start in range(0, len(users), users_at_once):
        chunk = slice(start, start + users_at_once)
        scores = states[chunk] @ item_table.T  # [users, num_items + 1]
        target = to_device(targets[chunk], device)[:, None]  # [users, 1]
        target_scores = scores.gather(1, target)  # [users, 1]
        rows, items = _rows_and_items(excluded, users[chunk])
        scores[:, 0] = float("-inf")
        scores.view(-1).index_fill_(0, to_device(rows * num_rows + items, device), float("-inf"))
        scores.scatter_(1, target, float("-inf"))
        # What is -inf counts as beaten, so that the others, NaN included, are the candidates that score at least as high.
        beaten = scores.lt_(target_scores).sum(1)  # in place, as floats: summing booleans takes twice the time of the product
        ranks.append(num_rows - beaten.long())
    return torch.cat(ranks)


def _rows_and_items(histories: Histories, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The interactions of some users: the user's place in `users` and the item, [interactions] each."""
    lengths = histories.lengths[users]
    first = np.repeat(histories.offsets[users] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return np.repeat(np.arange(len(users)), lengths), histories.items[first + np.arange(len(first))]
