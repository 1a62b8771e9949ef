"""Figures of a finished run: its training, its groups and what is typical of them, its users on a map, and who gained."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy import stats
from sklearn.decomposition import PCA

from utils.analysis.sheets import SheetRow, draw_sheet, item_tile, save_figure
from utils.data.dataset import Dataset
from utils.data.histories import Histories
from utils.run import reports as reporting
from utils.run.finished import finished_dataset, finished_options, rebuilt_run
from utils.run.pipeline import Run, has_groups
from utils.training.evaluation import ndcg_at

TYPICAL_ITEMS = 6
CUTOFF = 20  # of the NDCG whose gain is shown: the one that the best epoch is chosen by
CONFIDENCE = 0.95
MOST_POINTS = 20_000  # users on the map; more would only hide each other


# ---------------------------------------------------------------- what is typical of a group


@dataclass(frozen=True)
class Typical:
    """What a group buys more of than the others: items, the purchases of each, and their share there over that elsewhere."""

    items: np.ndarray
    counts: np.ndarray
    lifts: np.ndarray


def typical_items(histories: Histories, groups: np.ndarray, group: int, num_items: int, top: int = TYPICAL_ITEMS) -> Typical:
    """The items that set a group's purchases apart from all other users', the most telling first.

    Measured by the log-odds ratio with an informative Dirichlet prior, in standard errors (Monroe, Colaresi and Quinn, 2008):
    a plain ratio would favour items that were bought once or twice, by chance all in one group. The prior is the overall share
    of each item, worth one purchase an item on average.

    Args:
        histories: purchases.
        groups: each user row's group, [users].
        group: which.
        num_items: items are 1..num_items.
        top: how many at most; items that the group buys no more than others are left out.
    """
    inside = groups[histories.users] == group  # [purchases]
    ours = np.bincount(histories.items[inside], minlength=num_items + 1)[1:]  # [items]
    theirs = np.bincount(histories.items[~inside], minlength=num_items + 1)[1:]  # [items]
    prior = num_items * (ours + theirs) / max(1, len(histories.items))  # [items]
    bought = ours + theirs > 0
    scores = np.full(num_items, -np.inf)
    scores[bought] = _log_odds_z(ours, theirs, prior)[bought] if len(histories.items) else 0
    best = [row for row in np.argsort(-scores, kind="stable")[:top] if scores[row] > 0 and ours[row] > 0]
    share, other_share = ours[best] / max(1, ours.sum()), theirs[best] / max(1, theirs.sum())
    with np.errstate(divide="ignore"):
        return Typical(np.array(best, dtype=np.int64) + 1, ours[best], share / other_share)


def _log_odds_z(ours: np.ndarray, theirs: np.ndarray, prior: np.ndarray) -> np.ndarray:
    a, b = ours + prior, theirs + prior  # [items]
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.log(a / (a.sum() - a)) - np.log(b / (b.sum() - b))
        return difference / np.sqrt(1 / a + 1 / b)


def draw_typical(path: Path, run: Run) -> None:
    """Draw every group's size and most typical items."""
    sizes, rows = run.group_sizes(), []
    for group, size in enumerate(sizes):
        found = typical_items(run.split.train_and_valid, run.groups, group, run.dataset.num_items)
        tiles = [_typical_tile(run.dataset, *values) for values in zip(found.items, found.counts, found.lifts)]
        label = f"group {group}\n{size:,} users\n({100 * size / sum(sizes):.0f} %)"
        rows.append(SheetRow(label, tiles, size / sum(sizes), "no users" if not size else "nothing typical"))
    footnote = (
        "Most typical first: log-odds ratio of the group's purchases to all others', in standard errors (Dirichlet prior).\n"
        "Below an item: how often the group bought it, and its share of their purchases over its share of all others'."
    )
    draw_sheet(path, f"{run.folder.name}: what is typical of each group", rows, footnote)


def _typical_tile(dataset: Dataset, item: int, count: int, lift: float):
    ratio = f"{lift:.1f} x" if np.isfinite(lift) else "nobody else"
    return item_tile(dataset, item, f"{count} times, {ratio}")


# ---------------------------------------------------------------- the map of users


def group_colours(num_groups: int) -> list[tuple[float, ...]]:
    """A colour a group, as distinct as so many can be."""
    if num_groups <= 20:
        return list(colormaps["tab10" if num_groups <= 10 else "tab20"].colors[:num_groups])
    return [colormaps["hsv"](group / num_groups) for group in range(num_groups)]


def draw_map(path: Path, vectors: np.ndarray, groups: np.ndarray, num_groups: int, seed: int = 0) -> None:
    """Draw users in the plane of most variance, coloured by group.

    Args:
        path: the PNG to write.
        vectors: what users were grouped by, [users, hidden].
        groups: [users]
        num_groups: C.
        seed: of the users that are shown where they are too many.
    """
    if vectors.shape[1] == 1:  # of a recommender one number wide; the plane then is a line
        vectors = np.pad(vectors, ((0, 0), (0, 1)))
    pca = PCA(2, random_state=seed).fit(vectors)
    shown = np.random.default_rng(seed).permutation(len(vectors))[:MOST_POINTS]  # in no order, so that no group lies on top
    points, colours = pca.transform(vectors[shown]), group_colours(num_groups)
    figure = Figure(figsize=(6.6, 5.4), layout="constrained")
    axes = figure.subplots()
    size = float(np.clip(9000 / len(shown), 3, 30))
    axes.scatter(*points.T, s=size, c=[colours[group] for group in groups[shown]], alpha=0.6, linewidths=0)
    for group in np.unique(groups):
        centre = pca.transform(vectors[groups == group].mean(0, keepdims=True))[0]
        box = {"boxstyle": "circle", "facecolor": colours[group], "edgecolor": "white"}
        axes.text(*centre, str(group), color="white", weight="bold", fontsize=9, ha="center", va="center", bbox=box)
    shares = 100 * pca.explained_variance_ratio_
    few = f" ({len(shown):,} of {len(vectors):,} users)" if len(shown) < len(vectors) else f" ({len(vectors):,} users)"
    axes.set_title(f"what users are grouped by, in two dimensions{few}", fontsize=10)
    axes.set(xlabel=f"first principal component ({shares[0]:.0f} % of variance)", ylabel=f"second ({shares[1]:.0f} %)")
    axes.grid(alpha=0.3)
    save_figure(path, figure)


# ---------------------------------------------------------------- who gained


@dataclass(frozen=True)
class Gain:
    """The mean gain of some users and its 95 % interval, which is NaN for fewer than two."""

    label: str
    users: int
    mean: float
    low: float
    high: float


def mean_interval(differences: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """The mean of paired differences and its interval by Student's t, [users] -> mean, low, high."""
    number = len(differences)
    mean = float(differences.mean()) if number else np.nan
    if number < 2:
        return mean, np.nan, np.nan
    half = float(stats.t.ppf((1 + confidence) / 2, number - 1) * differences.std(ddof=1) / np.sqrt(number))
    return mean, mean - half, mean + half


def gains(folder: Path, user_ids: np.ndarray, groups: np.ndarray, num_groups: int) -> list[Gain]:
    """What PerPEFT gained over the global model it started from in test NDCG@20, for each group and for all users.

    Args:
        folder: the run folder, with the ranks of both stages.
        user_ids, groups: of all users, rows as in the data set, [users].
        num_groups: C.
    """
    before, after = (reporting.read_ranks(folder / f"{stage}_ranks.csv") for stage in ("global", "personalized"))
    differences = ndcg_at(CUTOFF, after["test"]) - ndcg_at(CUTOFF, before["test"])  # [evaluated users]
    own = groups[np.searchsorted(user_ids, after["users"])]  # [evaluated users]
    parts = [(f"group {group}", differences[own == group]) for group in range(num_groups)] + [("all users", differences)]
    return [Gain(label, len(part), *mean_interval(part)) for label, part in parts]


def draw_gains(path: Path, found: Sequence[Gain]) -> None:
    """Draw gains in percentage points, a line a group."""
    shown = [gain for gain in found if gain.users]
    figure = Figure(figsize=(6.6, 1.3 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, gain in enumerate(shown):
        colour = "black" if gain.label == "all users" else "tab:blue"
        if np.isfinite(gain.low):
            axes.plot([100 * gain.low, 100 * gain.high], [place, place], color=colour, lw=2)
        axes.plot(100 * gain.mean, place, "o", color=colour)
    axes.axvline(0, color="gray", lw=1)
    axes.set_yticks(range(len(shown)), [f"{gain.label} ({gain.users:,} users)" for gain in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_title("test NDCG@20: personalized minus global model", fontsize=10)
    axes.set_xlabel("percentage points: mean and 95 % interval (Student's t)\nthe global model is where stage 3 began to train")
    axes.grid(alpha=0.3, axis="x")
    save_figure(path, figure)


def told_gains(found: Sequence[Gain]) -> str:
    """The same in lines."""
    lines = []
    for gain in found:
        interval = f"[{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]" if np.isfinite(gain.low) else "no interval"
        told = f"{100 * gain.mean:+.2f} {interval}" if gain.users else "no evaluated users"
        lines.append(f"{gain.label:<11}{gain.users:>8} users  {told}")
    return "\n".join(lines)


# ---------------------------------------------------------------- all of them


def plot_run(folder: Path, train_dir: str, device: str | None, clip_model: str | None) -> str:
    """Draw all figures of a finished run into its folder `figures/`.

    Args:
        folder, train_dir, device, clip_model: as in `finished_options`.
    Returns:
        what was drawn, in words
    Raises:
        PerPEFTError: the run is not finished, or its data is not there or has changed.
    """
    options, expected = finished_options(folder, train_dir, device, clip_model)
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    reporting.draw_curves(figures / "curves.png", reporting.read_metrics(folder / "metrics.csv"))
    if not has_groups(options):
        return f"{figures / 'curves.png'}\nThe method '{options.method}' has no groups, so there is nothing more to draw."
    dataset = finished_dataset(options, expected)
    run = rebuilt_run(options, dataset, folder)
    run.load_global()
    vectors = run.user_vectors(run.item_inputs(0))
    run.load_personalized()
    draw_typical(figures / "groups.png", run)
    draw_map(figures / "users.png", vectors, run.groups, options.C)
    found = gains(folder, dataset.user_ids, run.groups, options.C)
    draw_gains(figures / "gain.png", found)
    told = f"test NDCG@20, personalized minus global model, percentage points:\n{told_gains(found)}"
    return "\n".join([told, *(str(figures / f"{name}.png") for name in ("curves", "groups", "users", "gain"))])
