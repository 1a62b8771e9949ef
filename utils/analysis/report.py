"""The report: one page that shows finished runs of one data set, alone or side by side."""
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from models.peft_configs import PEFT_TYPES
from utils.analysis.attention import explain_items
from utils.analysis.figures import group_colours, inline_svg, plot_gains, plot_users
from utils.analysis.groups import Interval, intervals_by_group, mean_interval, typical_items
from utils.analysis.page import Page, TileRow
from utils.analysis.recommendation import Recommender, known_user
from utils.common.errors import PerPEFTError
from utils.run.build import has_groups
from utils.run.finished import Models, finished_options, open_finished
from utils.run.folder import read_summary
from utils.run.plots import plot_loss, plot_ndcg
from utils.run.reports import read_metrics, read_ranks
from utils.training.evaluation import METRICS, user_values

TOP_K = 10  # items of a history and of a list of recommendations
MOST_RUNS = 26  # called A to Z


@dataclass(frozen=True)
class ResultRow:
    """A row of the results table: each metric's mean with its interval."""

    label: str
    split: str
    best_epoch: int | None
    cells: list[Interval]


@dataclass(frozen=True)
class GroupPart:
    """One group: its users, its gain, and its typical items."""

    number: int
    colour: str
    users: int
    share: float
    gain: Interval
    typical: TileRow
    anchor: str


class RunPart:
    """What the page shows of one run.

    Args:
        folder, train_dir, device, models: as in `finished_options`.
        name: how the run is called in tables that hold several: "A", "B", ...; "" where it is alone.
    """

    def __init__(self, folder: Path, train_dir: str, device: str | None, models: Models | None, name: str):
        self.name, self.folder = name, folder
        self.title = f"{name}: {folder.resolve().name}" if name else folder.resolve().name
        self.run = open_finished(folder, device, train_dir, models)
        self.options = self.run.options
        self.stages = ["global", "personalized"] if has_groups(self.options) else ["global"]
        self.summary = read_summary(folder / "summary.json")
        self.ranks = {stage: read_ranks(folder / f"{stage}_ranks.csv") for stage in self.stages}
        self.test_ranks = self.ranks[self.stages[-1]]["test"]  # of the last stage, from 0, [evaluated users]
        self.recommender = Recommender(self.run)
        self.groups: list[GroupPart] = []
        rows = read_metrics(folder / "metrics.csv")
        self.curves = [
            inline_svg(f"loss{name}", f"Training loss over {len(rows)} epochs", plot_loss, rows),
            inline_svg(f"ndcg{name}", f"NDCG@20 over {len(rows)} epochs", plot_ndcg, rows),
        ]

    def results(self) -> list[ResultRow]:
        """The results table with intervals, and the gain of the personalized over the global stage."""
        rows = []
        for stage in self.stages:
            for split in ("valid", "test"):
                ranks = self.ranks[stage][split]
                cells = [mean_interval(user_values(metric, ranks)) for metric in METRICS]
                rows.append(ResultRow(f"{self.name} {stage}".strip(), split, self.summary[stage]["best_epoch"], cells))
        if len(self.stages) == 2:
            before, after = (self.ranks[stage]["test"] for stage in self.stages)
            rows.append(difference_row(f"{self.name} personalized − global".strip(), before, after))
        return rows

    def show_groups(self, page: Page) -> None:
        """Fill in groups and their figures."""
        run, number = self.run, self.options.C
        before, after = (user_values("NDCG@20", self.ranks[stage]["test"]) for stage in self.stages)
        rows = np.searchsorted(run.dataset.user_ids, self.ranks["global"]["users"])  # of the evaluated users
        gains = intervals_by_group(after - before, run.groups[rows], number)
        sizes, colours = run.group_sizes(), group_colours(number)
        for group, (size, gain) in enumerate(zip(sizes, gains)):
            anchor = f"group-{self.name}{group}"
            found = typical_items(run.split.train_and_valid, run.groups, group, run.dataset.num_items)
            notes = [
                f"{count} times, {lift:.1f}×" if np.isfinite(lift) else f"{count} times, nobody else"
                for count, lift in zip(found.counts, found.lifts)
            ]
            label = f"group {self.name}{group}"
            tiles = [page.tile(int(item), anchor, label, note) for item, note in zip(found.items, notes)]
            row = TileRow("Most typical items", "", tiles, "no users" if not size else "no typical items")
            self.groups.append(GroupPart(group, colours[group], size, size / sum(sizes), gain, row, anchor))
        self.total_gain = gains[-1]
        labels = [f"group {group}" for group in range(number)] + ["all users"]
        vectors = self.recommender.user_vectors
        self.users_map = inline_svg(
            f"map{self.name}", f"Map of users in {number} groups", plot_users, vectors, run.groups, number, height=5
        )
        self.gains_plot = inline_svg(
            f"gains{self.name}", "Gain by group, as in the table", plot_gains, labels, gains, height=0.8 + 0.36 * len(gains)
        )

    def counts_of(self, item: int) -> str:
        """How many interactions an item has, in all and by group, in words."""
        histories = self.run.dataset.histories
        users = histories.users[histories.items == item]
        total = f"{len(users):,} interactions"
        if not self.groups:
            return total
        counts = np.bincount(self.run.groups[users], minlength=self.options.C)
        by_group = ", ".join(f"{count} in group {self.name}{group}" for group, count in enumerate(counts) if count)
        return f"{total}: {by_group}" if by_group else total


def difference_row(label: str, before: np.ndarray, after: np.ndarray) -> ResultRow:
    """Paired differences of two rankings of the same users, ranks from 0, [users]."""
    cells = [mean_interval(user_values(metric, after) - user_values(metric, before)) for metric in METRICS]
    return ResultRow(label, "test", None, cells)


class Choice(NamedTuple):
    """A user of the gallery: their number, why they are shown, and their gain in NDCG@20 in words where it is known."""

    user: int
    kind: str
    gain: str


def choose_users(ids: np.ndarray, before: np.ndarray | None, after: np.ndarray, number: int, seed: int = 0) -> list[Choice]:
    """Users for the gallery: a third have the largest gains, a third the largest losses, the rest are drawn at random.

    Args:
        ids: numbers of the evaluated users, [users].
        before, after: their test ranks from 0 by the models to compare; without `before` all are drawn at random.
        number: how many, or as many as there are.
        seed: of the draw.
    """
    gains = np.zeros(len(ids)) if before is None else user_values("NDCG@20", after) - user_values("NDCG@20", before)
    chosen: dict[int, str] = {}  # kinds by row
    for sign, kind in ((1, "Largest gain"), (-1, "Largest loss")) if before is not None else ():
        order = np.lexsort((sign * (after - before), -sign * gains))  # equal gains: by the change of the rank
        chosen |= {int(row): kind for row in order[: number // 3] if sign * gains[row] > 0}
    rest = [int(row) for row in np.random.default_rng(seed).permutation(len(ids)) if int(row) not in chosen]
    chosen |= dict.fromkeys(rest[: number - len(chosen)], "Drawn at random")
    return [Choice(int(ids[row]), kind, "" if before is None else f"{gains[row]:+.2f}") for row, kind in chosen.items()]


# Sections of summary.json that are shown, and their captions.
SETTINGS = {
    "dataset": "Data", "config": "Settings", "trainable_parameters": "Parameters", "seconds": "Seconds", "versions": "Versions"
}  # fmt: skip


def _settings(parts: Sequence[RunPart]) -> list[tuple[str, list[tuple[str, list[Any], bool]]]]:
    """What ran, as tables: their captions, and a name, a value a run and whether the values differ for each row."""
    summaries = [part.summary for part in parts]
    tables = []
    for section, caption in SETTINGS.items():
        rows = []
        for name in dict.fromkeys(name for summary in summaries for name in summary.get(section, {})):
            values = [_shown(summary.get(section, {}).get(name)) for summary in summaries]
            rows.append((name.replace("_", " "), values, len(set(values)) > 1))
        if section == "versions":
            rows.append(("device", [summary["device"] for summary in summaries], False))
        tables.append((caption, rows))
    return tables


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.1f}" if value >= 10 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _attention_items(parts: Sequence[RunPart], page: Page, number: int) -> list[int]:
    """Items to show attention for: typical ones, group by group, then those that most cards mention."""
    typical = [[tile.item for tile in group.typical.tiles] for part in parts for group in part.groups]
    longest = max(map(len, typical), default=0)
    first = [items[place] for place in range(longest) for items in typical if place < len(items)]
    others = sorted(page.items, key=lambda item: -len(page.items[item].mentions))
    return list(dict.fromkeys([*first, *others]))[:number]


def write_report(
    folders: Sequence[Path],
    path: Path,
    train_dir: str = "./dataset",
    device: str | None = None,
    models: Models | None = None,
    users: int = 30,
    items: int = 30,
) -> None:
    """Write a page that shows finished runs.

    Args:
        folders: run folders of one data set, one or more.
        path: the HTML file.
        train_dir, device, models: as in `finished_options`.
        users, items: how many users' recommendations and how many items' attention to show.
    Raises:
        PerPEFTError: a run is not finished, its data is missing or has changed, or the runs are of different data.
    """
    if len(folders) > MOST_RUNS:
        raise PerPEFTError(f"{len(folders)} runs are more than the {MOST_RUNS} that a report compares; name fewer")
    fingerprints = {finished_options(folder, train_dir, device)[1]["dataset_fingerprint"] for folder in folders}
    if len(fingerprints) > 1:  # before minutes of encoding
        raise PerPEFTError("the runs are of different data sets; a report compares runs of one")
    names = [""] if len(folders) == 1 else [chr(ord("A") + place) for place in range(len(folders))]
    parts = [RunPart(folder, train_dir, device, models, name) for folder, name in zip(folders, names)]
    dataset = parts[0].run.dataset
    page = Page(dataset, f"{'Runs' if names[0] else 'A run'} of {dataset.name}")
    for part in parts:
        if len(part.stages) == 2:
            part.show_groups(page)
    results = [row for part in parts for row in part.results()]
    results += [
        difference_row(f"{part.name} − {parts[0].name}", parts[0].test_ranks, part.test_ranks) for part in parts[1:]
    ]
    before, after = _compared(parts)
    ids = parts[0].ranks["global"]["users"]
    for choice in tqdm(choose_users(ids, before, after, users), "users", unit="user", disable=None):
        person = known_user(parts[0].run, choice.user)
        rankings = [(part.name, ranking) for part in parts for ranking in part.recommender.recommend(person, TOP_K)]
        page.add_user(person, rankings, TOP_K, choice.kind, choice.gain)
    chosen = _attention_items(parts, page, items)
    for part in parts:
        if part.options.peft_type in PEFT_TYPES and chosen:
            try:
                for explanation in explain_items(part.options, dataset, part.folder, chosen):
                    page.add_attention(explanation, part.name)
            except PerPEFTError as error:  # some models cannot show it
                print(f"note: {error}", file=sys.stderr)
    for card in page.items.values():
        card.counts = "; ".join(dict.fromkeys(part.counts_of(card.item) for part in parts))
    page.write(path, runs=parts, metrics=METRICS, results=results, settings=_settings(parts))


def _compared(parts: Sequence[RunPart]) -> tuple[np.ndarray | None, np.ndarray]:
    """Test ranks whose difference is a user's gain: of the first two runs, or of the two stages of one."""
    if len(parts) > 1:
        return parts[0].test_ranks, parts[1].test_ranks
    ranks = [parts[0].ranks[stage]["test"] for stage in parts[0].stages]
    return (ranks[0] if len(ranks) == 2 else None), ranks[-1]
