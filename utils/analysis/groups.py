"""What sets the user groups apart: the items typical of each, and what each gained, with intervals over users."""
from typing import NamedTuple

import numpy as np
from scipy import stats

from utils.data.histories import Histories


def typical_items(
    histories: Histories, groups: np.ndarray, group: int, num_items: int, top: int = 6
) -> list[tuple[int, int, float]]:
    """The items that set a group's interactions apart from all other users', the most distinctive first.

    Measured by the log-odds ratio with an informative Dirichlet prior, in standard errors (Monroe, Colaresi and Quinn, 2008):
    a plain ratio would favour items with one or two interactions, by chance all in one group. The prior is the overall share
    of each item, worth one interaction an item on average.

    Args:
        groups: each user row's group, [users].
        top: how many at most; items no more frequent in the group than elsewhere are left out.
    Returns:
        each one's number, interactions in the group, and share in the group over share elsewhere
    """
    inside = groups[histories.users] == group  # [interactions]
    ours, theirs = (np.bincount(histories.items[rows], minlength=num_items + 1)[1:] for rows in (inside, ~inside))  # [items]
    prior = num_items * (ours + theirs) / max(1, len(histories.items))
    a, b = ours + prior, theirs + prior
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN for items without interactions
        scores = (np.log(a / (a.sum() - a)) - np.log(b / (b.sum() - b))) / np.sqrt(1 / a + 1 / b)
        best = np.argsort(-scores, kind="stable")[:top]
        best = best[(scores[best] > 0) & (ours[best] > 0)]
        lifts = ours[best] / max(1, ours.sum()) / (theirs[best] / max(1, theirs.sum()))
    return list(zip((best + 1).tolist(), ours[best].tolist(), lifts.tolist()))


class Interval(NamedTuple):
    """A mean over users with its 95 % interval (Student's t), NaN for fewer than two users, and how many users."""

    mean: float
    low: float
    high: float
    users: int


def mean_interval(values: np.ndarray) -> Interval:
    """The mean of one value a user, [users], and its interval."""
    users = len(values)
    mean = float(values.mean()) if users else np.nan
    half = float(stats.t.ppf(0.975, users - 1) * values.std(ddof=1) / np.sqrt(users)) if users > 1 else np.nan
    return Interval(mean, mean - half, mean + half, users)
