"""Where a PerPEFT run wins and loses against another run: by rank depth, history length, popularity and group size; and how much
of its top 20 lies outside the items of the user's group."""
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from utils.analysis.groups import mean_interval
from utils.analysis.tables import markdown_table
from utils.common.errors import PerPEFTError
from utils.data.dataset import Dataset, read_dataset
from utils.data.histories import Histories, leave_last_out
from utils.run.build import has_groups
from utils.run.finished import finished_options
from utils.run.folder import dataset_fingerprint
from utils.run.reports import read_groups, read_ranks
from utils.training.evaluation import user_values
from utils.training.sampling import group_items

TOP = 20
# strata by lower bounds; each goes up to the next
HISTORY_LENGTHS = {1: "1 to 3", 4: "4 to 5", 6: "6 to 9", 10: "10 or more"}
POPULARITIES = {0: "0", 1: "1 or 2", 3: "3 to 5", 6: "6 to 10", 11: "11 or more"}
GROUP_SHARES = {0: "below 10 % of users", 0.1: "10 to 20 %", 0.2: "20 % or more"}


def difference(metric: str, own: np.ndarray, other: np.ndarray) -> str:
    """The mean difference of a metric in points and its 95 % interval over users; ranks from 0, [users] each."""
    found = mean_interval(100 * (user_values(metric, own) - user_values(metric, other)))
    return f"{found.mean:+.2f} ± {found.high - found.mean:.2f}"


def percent(ranks: np.ndarray, *metrics: str) -> str:
    """Means over users in percent, as in "6.74 / 3.09"; ranks from 0, [users]."""
    return " / ".join(f"{100 * user_values(metric, ranks).mean():.2f}" for metric in metrics)


def by_depth(own: np.ndarray, other: np.ndarray) -> str:
    """HR@K of both runs and the difference; test ranks from 0, [users] each."""
    metrics = [f"HR@{k}" for k in (1, 5, 10, 20, 50, 100, 200, 500)]
    rows = [[metric, percent(other, metric), percent(own, metric), difference(metric, own, other)] for metric in metrics]
    return markdown_table(["depth", "other run", "PerPEFT", "difference, points"], rows)


def by_stratum(own: np.ndarray, other: np.ndarray, values: np.ndarray, strata: dict[float, str], name: str) -> str:
    """Both runs by the stratum that each user's value lies in.

    Args:
        own, other: test ranks from 0, [users].
        values: what users are divided by, [users]; `name` heads their column.
        strata: lower bound, ascending, to name.
    """
    metrics = ("HR@20", "NDCG@20", "HR@100")
    stratum = np.searchsorted(list(strata), values, side="right") - 1  # [users]
    rows = []
    for number, label in enumerate(strata.values()):
        chosen = stratum == number
        if chosen.any():
            gains = [difference(metric, own[chosen], other[chosen]) for metric in metrics]
            rows.append([label, f"{100 * chosen.mean():.0f} %", *gains])
    return markdown_table([name, "users", *metrics], rows)


class GroupRanking(NamedTuple):
    """Each evaluated user's test item among all items and among the items of their group; ranks from 0, [users] each."""

    among_all: np.ndarray
    among_own: np.ndarray  # the number of items where the test item is none of the group's
    outside: np.ndarray  # whether the test item is none of the group's
    share: np.ndarray  # of the user's top items, how many are none of the group's


def rank_in_groups(vectors: Path, histories: Histories, groups: np.ndarray, top: int = TOP) -> GroupRanking:
    """Rank by exported vectors; a group's items are those in its users' training histories.

    Args:
        vectors: a folder of `export_vectors` with histories "train_and_valid"; a run without groups has one table of items.
        groups: each user row's group, [users].
        top: how many first items `share` is of.
    Raises:
        PerPEFTError: the vectors cannot be read, or are of other users.
    """
    split = leave_last_out(histories)
    users, shared = split.evaluated_users, not (vectors / "items_group_0.npy").is_file()
    own_items = group_items(split.train, groups, int(groups.max()) + 1)
    found = np.zeros((len(GroupRanking._fields), len(users)))
    try:
        states = np.load(vectors / "users.npy")  # [users, hidden]
        names = [f"items_{'global' if shared else f'group_{group}'}.npy" for group in range(len(own_items))]
        tables = [np.load(vectors / name, mmap_mode="r") for name in names]  # [items, hidden] each
    except (OSError, ValueError) as error:
        raise PerPEFTError(f"{vectors} holds no vectors of scripts.export_vectors ({error})") from error
    if len(states) != histories.num_users:
        raise PerPEFTError(f"{vectors} has vectors of {len(states)} users, but the data set has {histories.num_users}")
    masks = np.zeros((len(own_items), len(tables[0])), dtype=bool)  # [groups, items]
    for mask, items in zip(masks, own_items):
        mask[items - 1] = True
    for place, user in enumerate(tqdm(users, vectors.name, unit="user", disable=None)):
        is_own, target = masks[groups[user]], split.test[user] - 1
        scores = tables[groups[user]] @ states[user]  # [items]
        goal = scores[target]
        scores[split.train_and_valid[user] - 1] = -np.inf
        scores[target] = goal
        above = scores >= goal  # ties count against the model, as in evaluation
        best = np.argsort(-scores, kind="stable")[:top]
        among_own = above[is_own].sum() - 1 if is_own[target] else len(scores)
        found[:, place] = above.sum() - 1, among_own, not is_own[target], 1 - is_own[best].mean()
    return GroupRanking(*found)


def outside_the_group(rankings: dict[str, GroupRanking]) -> str:
    """By name: the share of the top 20 outside the group's items, and what ranking these items alone changes."""
    columns = ["vectors", f"top {TOP} outside the group's items", "test items outside", "HR@20 / NDCG@20, all items"]
    columns += ["the group's items", "difference HR@20", "NDCG@20"]
    metrics = ("HR@20", "NDCG@20")
    rows = []
    for name, (among_all, among_own, outside, share) in rankings.items():
        shares = [f"{100 * share.mean():.1f} %", f"{100 * outside.mean():.1f} %"]
        gains = [difference(metric, among_own, among_all) for metric in metrics]
        rows.append([name, *shares, percent(among_all, *metrics), percent(among_own, *metrics), *gains])
    return markdown_table(columns, rows)


def _dataset_and_ranks(run: Path, other: Path, train_dir: str | Path) -> tuple[Dataset, list[np.ndarray]]:
    """The data set that both runs were trained on, of which the first must have groups, and each one's test ranks, [users]."""
    opened = {folder: finished_options(folder, train_dir, "cpu") for folder in (run, other)}
    if not has_groups(opened[run][0]):
        raise PerPEFTError(f"{run} has no groups; name a PerPEFT run first")
    dataset, ranks = read_dataset(train_dir, opened[run][0].dataset, contents=False), []
    for folder in (run, other):
        options, expected = opened[folder]
        if dataset_fingerprint(dataset) != expected["dataset_fingerprint"]:
            raise PerPEFTError(f"data set '{dataset.name}' is not the one that {folder} was trained on")
        ranks.append(read_ranks(folder / f"{'personalized' if has_groups(options) else 'global'}_ranks.csv")["test"])
    return dataset, ranks


def compare(run: Path, other: Path, train_dir: str | Path, vectors: list[Path]) -> str:
    """All tables as Markdown.

    Args:
        run, other: folders of finished runs of one data set, the first with groups.
        vectors: folders of vectors, all ranked by the first run's groups.
    Raises:
        PerPEFTError: a run is not finished, has no groups, or belongs to other data.
    """
    dataset, (own, theirs) = _dataset_and_ranks(run, other, train_dir)
    groups = read_groups(run / "groups.csv")
    split = leave_last_out(dataset.histories)
    users = split.evaluated_users
    popularity = np.bincount(split.train.items, minlength=dataset.num_items + 1)  # [items + 1]
    group_shares = np.bincount(groups) / len(groups)  # [groups]
    parts = [
        by_depth(own, theirs),
        by_stratum(own, theirs, split.train.lengths[users], HISTORY_LENGTHS, "training history"),
        by_stratum(own, theirs, popularity[split.test[users]], POPULARITIES, "test item's interactions in training"),
        by_stratum(own, theirs, group_shares[groups[users]], GROUP_SHARES, "size of the user's group"),
    ]
    if vectors:
        parts.append(outside_the_group({folder.name: rank_in_groups(folder, dataset.histories, groups) for folder in vectors}))
    return "\n\n".join(parts)
