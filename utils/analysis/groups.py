"""What sets the user groups apart: the items typical of each, and what each gained, with intervals over users."""
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from utils.data.histories import Histories

TYPICAL_ITEMS = 6
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Typical:
    """Items more frequent in a group than elsewhere: interactions, and share in the group over share elsewhere, [items]."""

    items: np.ndarray
    counts: np.ndarray
    lifts: np.ndarray


def typical_items(histories: Histories, groups: np.ndarray, group: int, num_items: int, top: int = TYPICAL_ITEMS) -> Typical:
    """The items that set a group's interactions apart from all other users', the most distinctive first.

    Measured by the log-odds ratio with an informative Dirichlet prior, in standard errors (Monroe, Colaresi and Quinn, 2008):
    a plain ratio would favour items with one or two interactions, by chance all in one group. The prior is the overall share
    of each item, worth one interaction an item on average.

    Args:
        histories: interactions.
        groups: each user row's group, [users].
        group: which.
        num_items: items are 1..num_items.
        top: how many at most; items no more frequent in the group than elsewhere are left out.
    """
    inside = groups[histories.users] == group  # [interactions]
    ours = np.bincount(histories.items[inside], minlength=num_items + 1)[1:]  # [items]
    theirs = np.bincount(histories.items[~inside], minlength=num_items + 1)[1:]  # [items]
    prior = num_items * (ours + theirs) / max(1, len(histories.items))  # [items]
    occurring = ours + theirs > 0
    scores = np.full(num_items, -np.inf)
    scores[occurring] = _log_odds_z(ours, theirs, prior)[occurring] if len(histories.items) else 0
    best = [row for row in np.argsort(-scores, kind="stable")[:top] if scores[row] > 0 and ours[row] > 0]
    share, other_share = ours[best] / max(1, ours.sum()), theirs[best] / max(1, theirs.sum())
    with np.errstate(divide="ignore"):
        return Typical(np.array(best, dtype=np.int64) + 1, ours[best], share / other_share)


def _log_odds_z(ours: np.ndarray, theirs: np.ndarray, prior: np.ndarray) -> np.ndarray:
    a, b = ours + prior, theirs + prior  # [items]
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.log(a / (a.sum() - a)) - np.log(b / (b.sum() - b))
        return difference / np.sqrt(1 / a + 1 / b)


class Interval(NamedTuple):
    """A mean over users with its 95 % interval (Student's t), NaN for fewer than two users, and how many users."""

    mean: float
    low: float
    high: float
    users: int


def mean_interval(values: np.ndarray) -> Interval:
    """The mean of one value a user and its interval by Student's t, [users]."""
    number = len(values)
    mean = float(values.mean()) if number else np.nan
    if number < 2:
        return Interval(mean, np.nan, np.nan, number)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, number - 1) * values.std(ddof=1) / np.sqrt(number))
    return Interval(mean, mean - half, mean + half, number)


def intervals_by_group(differences: np.ndarray, groups: np.ndarray, num_groups: int) -> list[Interval]:
    """The mean difference of each group's users and, last, of all users; both arguments are [users]."""
    return [mean_interval(differences[groups == group]) for group in range(num_groups)] + [mean_interval(differences)]
