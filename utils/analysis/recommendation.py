"""What a finished run recommends to a user under their own group's adapter, the global one, and another group's."""
import copy
from typing import Any, NamedTuple

import numpy as np
import torch

from models import SASRec
from utils.common.errors import PerPEFTError
from utils.data.dataset import Dataset
from utils.data.histories import Histories
from utils.run.build import has_groups
from utils.run.finished import item_number, user_row
from utils.run.run import Run
from utils.training.evaluation import last_states, rank_targets


class Person(NamedTuple):
    """Whom to recommend to."""

    name: str  # in words
    history: np.ndarray  # item numbers in time order, [interactions]
    test_item: int | None  # the held-out next item, where it is known
    row: int | None  # of the data set's user; None for a new user

    @property
    def history_note(self) -> str:
        """Which interactions the history holds."""
        if self.row is None:
            return "the given items; the group is the one whose centre is nearest"
        if self.test_item is None:
            return "all interactions (fewer than 3, so there is no test item)"
        return "training and validation interactions; the test item, which comes next, is a candidate"


# The best items by one adapter, as recommend_{user}.json holds them: "adapter" ("own group", "global" or "other group"), "group"
# (None for the global one), "rank_of_test_item" among all candidates, and "items", the best first; ranks count from 1, scores
# are dot products with the user's state.
Ranking = dict[str, Any]


def label_of(ranking: Ranking) -> str:
    """The adapter in words."""
    return ranking["adapter"] if ranking["group"] is None else f"{ranking['adapter']} ({ranking['group']})"


def known_user(run: Run, number: int) -> Person:
    """A user of the data set by their number in `{name}_final.txt`; a PerPEFTError where there is none."""
    row = user_row(run.dataset, number)
    return Person(f"user {number}", run.split.train_and_valid[row], int(run.split.test[row]) or None, row)


def new_user(dataset: Dataset, raw_ids: list[str]) -> Person:
    """A user who is not in the data set, with these items as history, in time order; a PerPEFTError if one is unknown."""
    return Person("a new user", np.array([item_number(dataset, raw_id) for raw_id in raw_ids]), None, None)


def best_items(state: torch.Tensor, table: torch.Tensor, excluded: np.ndarray, top_k: int) -> list[tuple[int, float]]:
    """The items of highest score that are not excluded and their scores, the best first, the lower number first at equal scores.

    Args:
        state: the user's, [hidden].
        table: the e_i of all items, [num_items + 1, hidden].
        top_k: how many, or as many as there are.
    """
    scores = (table @ state).cpu().double().numpy()  # [num_items + 1]
    candidates = np.setdiff1d(np.arange(1, len(scores)), excluded)
    best = candidates[np.argsort(-scores[candidates], kind="stable")[:top_k]]
    return list(zip(best.tolist(), scores[best].tolist()))


def choose_groups(vector: np.ndarray, own: int | None, centres: np.ndarray, other: int | None) -> tuple[int, int | None]:
    """The group of a user, and another one to compare with.

    Args:
        vector: the user's by the global model, [hidden].
        own: the user's group; by default the one with the nearest centre.
        centres: [groups, hidden], NaN for a group without users.
        other: the other group; by default the one whose centre is farthest from the user, if there is another.
    Raises:
        PerPEFTError: there is no such other group, or it is the user's own.
    """
    distances = np.linalg.norm(centres - vector, axis=1)  # [groups]
    own = int(np.nanargmin(distances)) if own is None else own
    if other is None:
        distances[own] = np.nan
        return own, None if np.isnan(distances).all() else int(np.nanargmax(distances))
    if other >= len(centres) or other == own:
        what = f"the user's own group is {own}" if other == own else f"the run has groups 0 to {len(centres) - 1}"
        raise PerPEFTError(f"--other_group {other}: {what}; name another")
    return own, other


def _item(dataset: Dataset, item: int) -> dict[str, Any]:
    return {"item": item, "raw_id": dataset.raw_ids[item - 1], "title": dataset.titles[item - 1]}


class Recommender:
    """A finished run that ranks for any user by any adapter; every adapter's item table is encoded once, when first needed.

    Args:
        run: from `open_finished`; its model is in use from now on.
    Attributes:
        user_vectors: what users were grouped by, [users, hidden].
    Raises:
        PerPEFTError: weights cannot be read.
    """

    def __init__(self, run: Run):
        self.run = run
        self.grouped = has_groups(run.options)
        run.load_global()
        table = run.item_table(0)
        self.user_vectors = run.user_vectors(table)
        self._models: dict[int | None, tuple[SASRec, torch.Tensor]] = {None: (copy.deepcopy(run.model.sasrec), table)}
        if self.grouped:
            run.load_personalized()  # whose SASRec takes the place of the global one, copied above
            self._centres = np.full((run.options.C, self.user_vectors.shape[1]), np.nan)  # [groups, hidden]
            for group in np.unique(run.groups):
                self._centres[group] = self.user_vectors[run.groups == group].mean(0, dtype=np.float64)

    def _state(self, group: int | None, history: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The user's state [hidden] after a history, and the item table [num_items + 1, hidden], by one adapter."""
        if group not in self._models:
            self._models[group] = (self.run.model.sasrec, self.run.item_table(group))
        sasrec, table = self._models[group]
        return last_states(sasrec, table, Histories.of_lists([history]), np.array([0]))[0], table

    def _ranking(self, person: Person, top_k: int, adapter: str, group: int | None) -> Ranking:
        state, table = self._state(group, person.history)
        test_rank = None
        if person.test_item is not None:
            excluded = Histories.of_lists([person.history])
            test_rank = 1 + int(rank_targets(state[None], table, np.array([person.test_item]), excluded, np.array([0]))[0])
        best = enumerate(best_items(state, table, person.history, top_k), 1)
        items = [{"rank": rank, **_item(self.run.dataset, item), "score": score} for rank, (item, score) in best]
        return {"adapter": adapter, "group": group, "rank_of_test_item": test_rank, "items": items}

    def recommend(self, person: Person, top_k: int, other_group: int | None = None) -> list[Ranking]:
        """The best items by a person's own group's adapter, the global one, and another group's, if the run has groups.

        Args:
            other_group: as in `choose_groups`.
        Raises:
            PerPEFTError: `other_group` is no other group, or a new user has no nearest group.
        """
        options = self.run.options
        if other_group is not None and not self.grouped:
            raise PerPEFTError(f"--other_group {other_group}: this run's method '{options.method}' has no groups")
        by_global = self._ranking(person, top_k, "global", None)
        if not self.grouped:
            return [by_global]
        if person.row is None and options.grouping == "random":
            raise PerPEFTError("--history: this run's groups are random, so a new user belongs to none; use --user instead")
        known = None if person.row is None else int(self.run.groups[person.row])
        vector = self._state(None, person.history)[0].cpu().numpy()
        own, other = choose_groups(vector, known, self._centres, other_group)
        others = [] if other is None else [self._ranking(person, top_k, "other group", other)]
        return [self._ranking(person, top_k, "own group", own), by_global, *others]


def as_json(run: Run, person: Person, rankings: list[Ranking]) -> dict[str, Any]:
    """All recommendations in plain values."""
    dataset = run.dataset
    return {
        "run": run.folder.resolve().name,
        "user": None if person.row is None else int(dataset.user_ids[person.row]),
        "history_is": person.history_note,
        "history": [_item(dataset, int(item)) for item in person.history],
        "test_item": None if person.test_item is None else _item(dataset, person.test_item),
        "recommendations": rankings,
    }


def as_text(person: Person, rankings: list[Ranking]) -> str:
    """The best items' titles, one a line."""
    lines = [f"history: {person.history_note}"]
    for ranking in rankings:
        test_rank = ranking["rank_of_test_item"]
        lines.append(label_of(ranking) + ("" if test_rank is None else f"; the test item has rank {test_rank}"))
        for item in ranking["items"]:
            mark = "  <- test item" if item["item"] == person.test_item else ""
            lines.append(f"  {item['rank']:>3}  {item['raw_id']}  {item['title'][:80]}{mark}")
    return "\n".join(lines)
