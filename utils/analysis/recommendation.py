"""What a finished run recommends to a user under their own group's adapter, the global one, and another group's."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.analysis.sheets import SheetRow, draw_sheet, item_tile
from utils.common.errors import PerPEFTError
from utils.data.dataset import Dataset
from utils.run.finished import group_centres, item_number, state_after, user_row
from utils.run.pipeline import Run, has_groups
from utils.run.reports import write_json


@dataclass(frozen=True)
class Person:
    """Whom to recommend to.

    Attributes:
        name: in words.
        history: items bought, in time order, [purchases].
        test_item: what they bought next and the model has not seen; None where that is not known.
        row: of the data set's user; None for a history that was given.
    """

    name: str
    history: np.ndarray
    test_item: int | None
    row: int | None


@dataclass(frozen=True)
class Ranking:
    """The best items by one adapter.

    Attributes:
        adapter: "own group", "global" or "other group".
        group: whose adapter; None for the global one.
        items: the best first, [top_k].
        scores: dot products of the user's state with the items, [top_k].
        test_rank: the test item's rank among all candidates, from 1; None where there is none.
    """

    adapter: str
    group: int | None
    items: np.ndarray
    scores: np.ndarray
    test_rank: int | None

    @property
    def label(self) -> str:
        """The adapter in words."""
        return self.adapter if self.group is None else f"{self.adapter} ({self.group})"


def known_user(run: Run, number: int) -> Person:
    """A user of the data set by their number in `{name}_final.txt`; their history is what they bought before the test item.

    Raises:
        PerPEFTError: there is no such user.
    """
    row = user_row(run.dataset, number)
    test_item = int(run.split.test[row]) or None
    return Person(f"user {number}", run.split.train_and_valid[row], test_item, row)


def new_user(dataset: Dataset, raw_ids: list[str]) -> Person:
    """Somebody who bought these items, in time order.

    Raises:
        PerPEFTError: an item is unknown.
    """
    return Person("a new user", np.array([item_number(dataset, raw_id) for raw_id in raw_ids]), None, None)


def best_items(state: torch.Tensor, table: torch.Tensor, bought: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The items of highest score that were not bought, the best first; at equal scores the lower number comes first.

    Args:
        state: the user's, [hidden].
        table: the e_i of all items, [num_items + 1, hidden].
        bought: items that are no candidates.
        top_k: how many, or as many as there are.
    Returns:
        items and their scores, [top_k] each
    """
    scores = (table @ state).cpu().double().numpy()  # [num_items + 1]
    candidates = np.setdiff1d(np.arange(1, len(scores)), bought)
    best = candidates[np.argsort(-scores[candidates], kind="stable")[:top_k]]
    return best, scores[best]


def _rank_of(target: int | None, state: torch.Tensor, table: torch.Tensor, bought: np.ndarray) -> int | None:
    """As `utils.training.evaluation` ranks, from 1: ties count against the target, which is a candidate even if bought before."""
    if target is None:
        return None
    scores = (table @ state).cpu().numpy()  # [num_items + 1]
    others = np.setdiff1d(np.arange(1, len(scores)), np.append(bought, target))
    return 1 + int((~(scores[others] < scores[target])).sum())


def _ranking(run: Run, table: torch.Tensor, person: Person, top_k: int, adapter: str, group: int | None) -> Ranking:
    state = state_after(run, table, person.history)
    items, scores = best_items(state, table, person.history, top_k)
    return Ranking(adapter, group, items, scores, _rank_of(person.test_item, state, table, person.history))


def choose_groups(vector: np.ndarray, own: int | None, centres: np.ndarray, other: int | None) -> tuple[int, int | None]:
    """The group of a user, and another one to compare with.

    Args:
        vector: the user's by the global model, [hidden].
        own: the user's group, where it is known; else it is the one with the nearest centre.
        centres: [groups, hidden], NaN for a group without users.
        other: which other group is wanted; by default the one whose centre is farthest from the user.
    Returns:
        the group and the other, None where there is only one
    Raises:
        PerPEFTError: the other group is none, or the user's own.
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


def recommend(run: Run, person: Person, top_k: int, other_group: int | None = None) -> list[Ranking]:
    """Rank all items that a person has not bought by their own group's adapter, the global one, and another group's.

    In runs without groups there is the one model only, called "global".

    Args:
        run: as `open_finished` gives it.
        person: from `known_user` or `new_user`.
        top_k: how many items to keep.
        other_group: as in `choose_groups`.
    Raises:
        PerPEFTError: weights cannot be read, or `other_group` is no other group.
    """
    grouped = has_groups(run.options)
    if other_group is not None and not grouped:
        raise PerPEFTError(f"--other_group {other_group}: this run's method '{run.options.method}' has no groups")
    if person.row is None and grouped and run.options.grouping == "random":
        raise PerPEFTError("--history: this run's groups are random, so a new user belongs to none; name a --user instead")
    run.load_global()
    table = run.item_inputs(0)
    by_global = _ranking(run, table, person, top_k, "global", None)
    if not grouped:
        return [by_global]
    vectors, vector = run.user_vectors(table), state_after(run, table, person.history).cpu().numpy()
    run.load_personalized()
    centres = group_centres(vectors, run.groups, run.options.C)
    own = None if person.row is None else int(run.groups[person.row])
    own, other = choose_groups(vector, own, centres, other_group)
    rankings = [_ranking(run, run.item_inputs(own), person, top_k, "own group", own), by_global]
    if other is not None:
        rankings.append(_ranking(run, run.item_inputs(other), person, top_k, "other group", other))
    return rankings


# ---------------------------------------------------------------- what is written


def _told_history(person: Person) -> str:
    if person.row is None:
        return "the items given; the group is the one whose centre is nearest"
    if person.test_item is None:
        return "all purchases (fewer than 3, so there is no test item)"
    return "training and validation purchases; the test item, bought next, is a candidate"


def _told_item(dataset: Dataset, item: int) -> dict[str, Any]:
    return {"item": item, "raw_id": dataset.raw_ids[item - 1], "title": dataset.titles[item - 1]}


def as_json(run: Run, person: Person, rankings: list[Ranking]) -> dict[str, Any]:
    """All that was recommended, in plain values; ranks count from 1."""
    dataset = run.dataset
    history = [_told_item(dataset, int(item)) for item in person.history]
    return {
        "run": run.folder.resolve().name,
        "user": None if person.row is None else int(dataset.user_ids[person.row]),
        "history_is": _told_history(person),
        "history": history,
        "test_item": None if person.test_item is None else _told_item(dataset, person.test_item),
        "recommendations": [
            {
                "adapter": ranking.adapter,
                "group": ranking.group,
                "rank_of_test_item": ranking.test_rank,
                "items": [
                    {"rank": rank, **_told_item(dataset, item), "score": score}
                    for rank, (item, score) in enumerate(zip(ranking.items.tolist(), ranking.scores.tolist()), 1)
                ],
            }
            for ranking in rankings
        ],
    }


def draw_recommendations(path: Path, run: Run, person: Person, rankings: list[Ranking], top_k: int) -> None:
    """Draw the history and each adapter's recommendations as rows of images; the test item is framed."""
    shown = person.history[-top_k:]
    few = f"last {len(shown)} of {len(person.history)}" if len(shown) < len(person.history) else f"{len(shown)} items"
    history = SheetRow(f"history\n({few},\nlatest last)", [item_tile(run.dataset, int(item)) for item in shown])
    rows = [history, *(_row(run.dataset, ranking, person.test_item) for ranking in rankings)]
    footnote = f"History: {_told_history(person)}. Bought items are not recommended. Below an item: its score."
    if person.test_item is not None:
        footnote += "\nRed frame: the test item."
    draw_sheet(path, f"Recommended to {person.name} by {run.folder.resolve().name}", rows, footnote)


def _row(dataset: Dataset, ranking: Ranking, test_item: int | None) -> SheetRow:
    label = ranking.adapter if ranking.group is None else f"{ranking.adapter}\n(group {ranking.group})"
    if ranking.test_rank is not None:
        label += f"\n\ntest item is\nnumber {ranking.test_rank:,}"
    scored = zip(ranking.items.tolist(), ranking.scores.tolist())
    tiles = [item_tile(dataset, item, f"{score:.2f}", item == test_item) for item, score in scored]
    return SheetRow(label, tiles, when_empty="everything is bought already")


def write_recommendations(path: Path, run: Run, person: Person, rankings: list[Ranking], top_k: int) -> Path:
    """Write the sheet, and the same as JSON beside it; returns the JSON's path."""
    draw_recommendations(path, run, person, rankings, top_k)
    write_json(path.with_suffix(".json"), as_json(run, person, rankings))
    return path.with_suffix(".json")


def told_recommendations(run: Run, person: Person, rankings: list[Ranking]) -> str:
    """The best items' titles in lines."""
    lines = [f"history: {_told_history(person)}"]
    for ranking in rankings:
        test = "" if ranking.test_rank is None else f"; the test item is number {ranking.test_rank}"
        lines.append(f"{ranking.label}{test}")
        for rank, item in enumerate(ranking.items.tolist(), 1):
            mark = "  <- test item" if item == person.test_item else ""
            lines.append(f"  {rank:>3}  {run.dataset.raw_ids[item - 1]}  {run.dataset.titles[item - 1][:80]}{mark}")
    return "\n".join(lines)
