"""Full-ranking evaluation: every item encoded once a group, every user's held-out item ranked against all others."""
import contextlib
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from models import PerPEFT, SASRec
from utils.data.histories import Histories, Split
from utils.training.processes import Processes

CUTOFFS = (10, 20, 30)
METRICS = tuple(f"{name}@{k}" for name in ("HR", "NDCG") for k in CUTOFFS)
ALONE = Processes(torch.device("cpu"))
SCORES_AT_ONCE = 2**24  # entries of a score matrix held at a time: memory stays flat in the number of users


class ItemSource(Protocol):
    """What an encoder's inputs are fetched from: images and tokens, or hidden states."""

    num_items: int

    def fetch(self, items: np.ndarray, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Inputs of some items (numbers from 1) on a device."""

    def reading_order(self) -> np.ndarray:
        """All items, in the order in which encoding them in batches is cheapest."""

    def place_on(self, device: torch.device) -> None:
        """Keep what can be kept on the device."""


@torch.no_grad()
def encode_all_items(
    model: PerPEFT,
    group: int,
    source: ItemSource,
    device: torch.device,
    items_at_once: int = 256,
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    processes: Processes = ALONE,
) -> torch.Tensor:
    """Projected vectors of all items as one group sees them, [num_items + 1, hidden], row 0 the padding item's.

    Args:
        model: in eval mode.
        group: whose adapter and projector act.
        source: where inputs come from.
        device: where the model lies.
        items_at_once: items a forward pass.
        autocast: a callable that makes the context of the foundation model's forward pass.
        processes: those that share the work; all get all vectors.
    """
    order = source.reading_order()
    vectors = None
    starts = range(0, len(order), items_at_once)
    for start in starts[processes.rank :: processes.size]:
        items = order[start : start + items_at_once]
        inputs = source.fetch(items, device)
        with autocast():
            chunk = model.item_vectors(group, inputs)
        chunk = chunk.float()  # [1 + items, hidden]
        if vectors is None:
            vectors = torch.zeros(source.num_items + 1, chunk.shape[1], device=device)
            if processes.is_first:  # every chunk brings the padding item's vector, but the sum must hold it once
                vectors[0] = chunk[0]
        vectors[torch.from_numpy(items).to(device)] = chunk[1:]
    if vectors is None:  # fewer chunks than processes
        vectors = torch.zeros(source.num_items + 1, model.sasrec.hidden_units, device=device)
    return processes.sum_(vectors)


@torch.no_grad()
def last_states(
    sasrec: SASRec, inputs: torch.Tensor, histories: Histories, users: np.ndarray, users_at_once: int = 8192
) -> torch.Tensor:
    """The recommender's state after each user's last purchase, [users, hidden].

    Args:
        sasrec: in eval mode.
        inputs: the table of e_i, [num_items + 1, hidden].
        histories: what the users have bought.
        users: their rows.
        users_at_once: users a forward pass.
    """
    chunks = [inputs.new_empty(0, inputs.shape[1])]
    for start in range(0, len(users), users_at_once):
        seq = histories.last(users[start : start + users_at_once], sasrec.maxlen)  # [users, time]
        states = sasrec.states_from_inputs(torch.from_numpy(seq).to(inputs.device), inputs)  # [users, time, hidden]
        chunks.append(states[:, -1])
    return torch.cat(chunks)


@torch.no_grad()
def rank_targets(
    states: torch.Tensor, inputs: torch.Tensor, targets: np.ndarray, excluded: Histories, users: np.ndarray
) -> np.ndarray:
    """How many other candidates score at least as high as each user's target; ties, and scores that are no numbers, count
    against the model.

    Args:
        states: last states of the users, [users, hidden].
        inputs: the table of e_i, [num_items + 1, hidden].
        targets: each user's held-out item, [users].
        excluded: the items that are no candidates for a user (the target itself always is one).
        users: the users' rows in `excluded`, [users].
    Returns:
        0 for a target that beats all, [users].
    """
    num_rows = inputs.shape[0]
    users_at_once = max(1, SCORES_AT_ONCE // num_rows)
    ranks = []
    for start in range(0, len(users), users_at_once):
        chunk = users[start : start + users_at_once]
        scores = states[start : start + users_at_once] @ inputs.T  # [users, num_items + 1]
        target = torch.from_numpy(targets[start : start + users_at_once]).to(scores.device)[:, None]  # [users, 1]
        target_scores = scores.gather(1, target)  # [users, 1]
        lengths = excluded.offsets[chunk + 1] - excluded.offsets[chunk]
        first = np.repeat(excluded.offsets[chunk] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
        excluded_items = excluded.items[first + np.arange(len(first))]
        flat = np.repeat(np.arange(len(chunk)) * num_rows, lengths) + excluded_items
        no_candidate = float("-inf")
        scores[:, 0] = no_candidate
        scores.view(-1)[torch.from_numpy(flat).to(scores.device)] = no_candidate
        scores.scatter_(1, target, no_candidate)
        ranks.append((num_rows - (scores < target_scores).sum(1)).cpu().numpy())
    # Rows that were set to -inf are below any finite target, so they are not counted.
    return np.concatenate(ranks) if ranks else np.empty(0, np.int64)


def ndcg_at(k: int, ranks: np.ndarray) -> np.ndarray:
    """Each user's NDCG@k, 1 / log2(rank + 2) if rank < k, else 0, of ranks from 0, [users]."""
    return 1 / np.log2(ranks + 2.0) * (ranks < k)


def metrics_of(ranks: np.ndarray) -> dict[str, float]:
    """HR@K (the share of ranks below K) and NDCG@K for K of CUTOFFS, means over users."""
    return {f"HR@{k}": float((ranks < k).mean()) for k in CUTOFFS} | {
        f"NDCG@{k}": float(ndcg_at(k, ranks).mean()) for k in CUTOFFS
    }


def rank_all_users(
    model: PerPEFT,
    split: Split,
    groups: np.ndarray,
    encode: Callable[[int], torch.Tensor],
    processes: Processes = ALONE,
) -> dict[str, np.ndarray]:
    """Ranks of every evaluated user's valid and test item, each user by their own group's adapter and projector.

    Args:
        model: in eval mode.
        split: histories and held-out items.
        groups: each user row's group, [users].
        encode: a group's projected item vectors, [num_items + 1, hidden]; called by all processes.
        processes: those that share the users of every group; all get all ranks.
    Returns:
        {"users": rows of evaluated users, "valid": their ranks, "test": their ranks}
    """
    users = split.evaluated_users
    if not (groups[users] < model.num_groups).all():
        raise ValueError(f"a user is in group {groups[users].max()}, but the model has {model.num_groups} groups")
    ranks = {name: np.zeros(len(users), dtype=np.int64) for name in ("valid", "test")}
    for group in range(model.num_groups):
        places = np.flatnonzero(groups[users] == group)
        if not len(places):
            continue
        places = places[processes.rank :: processes.size]
        members = users[places]
        inputs = model.sasrec.item_inputs(encode(group)).detach()  # [num_items + 1, hidden]
        for name, histories, targets in (
            ("valid", split.train, split.valid),
            ("test", split.train_and_valid, split.test),
        ):
            states = last_states(model.sasrec, inputs, histories, members)
            ranks[name][places] = rank_targets(states, inputs, targets[members], histories, members)
    sums = {name: processes.sum_(torch.from_numpy(own).to(processes.device)).cpu().numpy() for name, own in ranks.items()}
    return {"users": users, **sums}
