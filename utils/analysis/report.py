"""The report: one page that shows finished runs of one data set, alone or side by side."""
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
from tqdm import tqdm

from models.peft_configs import PEFT_TYPES
from utils.analysis.attention import explain_items
from utils.analysis.figures import group_colours, inline_svg, plot_gains, plot_users
from utils.analysis.groups import Interval, mean_interval, typical_items
from utils.analysis.page import Page
from utils.analysis.recommendation import Recommender, known_user
from utils.common.errors import PerPEFTError
from utils.run.build import has_groups
from utils.run.finished import finished_options, open_finished
from utils.run.folder import read_summary
from utils.run.plots import plot_loss, plot_ndcg
from utils.run.reports import read_metrics, read_ranks
from utils.training.evaluation import METRICS, SPLITS, user_values

TOP_K = 10  # items of a history and of a list of recommendations
SETTINGS = {  # sections of summary.json that are shown, and their captions
    "dataset": "Data", "config": "Settings", "trainable_parameters": "Parameters", "seconds": "Seconds", "versions": "Versions"
}  # fmt: skip

ResultRow = tuple[str, str, int | None, list[Interval]]  # label, split, best epoch (None of a difference), each metric's mean


class RunPart:
    """What the page shows of one run.

    Args:
        folder, place: as in `open_finished`.
        name: how the run is called in tables that hold several: "A", "B", ...; "" where it is alone.
    """

    def __init__(self, folder: Path, place: dict[str, Any], name: str):
        self.name, self.folder = name, folder
        self.title = f"{name}: {folder.resolve().name}" if name else folder.resolve().name
        self.run = open_finished(folder, **place)
        self.options = self.run.options
        self.stages = ["global", "personalized"] if has_groups(self.options) else ["global"]
        self.summary = read_summary(folder / "summary.json")
        self.ranks = [read_ranks(folder / f"{stage}_ranks.csv") for stage in self.stages]
        self.test_ranks = [ranks["test"] for ranks in self.ranks]  # of each stage, from 0, [evaluated users]
        self.recommender = Recommender(self.run)
        self.groups: list[dict[str, Any]] = []  # the variables of their cards
        rows = read_metrics(folder / "metrics.csv")
        self.curves = [
            inline_svg(f"loss{name}", f"Training loss over {len(rows)} epochs", plot_loss, rows),
            inline_svg(f"ndcg{name}", f"NDCG@20 over {len(rows)} epochs", plot_ndcg, rows),
        ]

    def results(self) -> list[ResultRow]:
        """The results table with intervals, and the gain of the personalized over the global stage."""
        rows = []
        for stage, ranks in zip(self.stages, self.ranks):
            for split in SPLITS:
                cells = [mean_interval(user_values(metric, ranks[split])) for metric in METRICS]
                rows.append((f"{self.name} {stage}".strip(), split, self.summary[stage]["best_epoch"], cells))
        if len(self.stages) == 2:
            rows.append(_difference_row(f"{self.name} personalized − global".strip(), *self.test_ranks))
        return rows

    def show_groups(self, page: Page) -> None:
        """Fill in groups and their figures."""
        run, number = self.run, self.options.C
        before, after = (user_values("NDCG@20", ranks) for ranks in self.test_ranks)
        groups = run.groups[np.searchsorted(run.dataset.user_ids, self.ranks[0]["users"])]  # of the evaluated users
        gains = [mean_interval((after - before)[groups == group]) for group in range(number)] + [mean_interval(after - before)]
        self.total_gain = gains[-1]
        for group, (size, colour, gain) in enumerate(zip(run.group_sizes(), group_colours(number), gains)):
            label, anchor = f"group {self.name}{group}", f"group-{self.name}{group}"
            tiles = []
            for item, count, lift in typical_items(run.split.train_and_valid, run.groups, group, run.dataset.num_items):
                elsewhere = f"{lift:.1f}×" if np.isfinite(lift) else "nobody else"
                tiles.append(page.tile(item, anchor, label, f"{count} times, {elsewhere}"))
            card = {"number": group, "colour": colour, "users": size, "share": size / len(run.groups), "gain": gain}
            self.groups.append({**card, "typical": tiles, "anchor": anchor})
        labels = [*(f"group {group}" for group in range(number)), "all users"]
        users = (plot_users, self.recommender.user_vectors, run.groups, number)
        self.users_map = inline_svg(f"map{self.name}", f"Map of users in {number} groups", *users, height=5)
        title, height = "Gain by group, as in the table", 0.8 + 0.36 * len(gains)
        self.gains_plot = inline_svg(f"gains{self.name}", title, plot_gains, labels, gains, height=height)

    def counts_of(self, item: int) -> str:
        """How many interactions an item has, in all and by group, in words."""
        histories = self.run.dataset.histories
        users = histories.users[histories.items == item]
        counts = np.bincount(self.run.groups[users], minlength=self.options.C) if self.groups else []
        by_group = ", ".join(f"{count} in group {self.name}{group}" for group, count in enumerate(counts) if count)
        return f"{len(users):,} interactions" + (f": {by_group}" if by_group else "")


def _difference_row(label: str, before: np.ndarray, after: np.ndarray) -> ResultRow:
    """Paired differences of two rankings of the same users, ranks from 0, [users]."""
    cells = [mean_interval(user_values(metric, after) - user_values(metric, before)) for metric in METRICS]
    return label, "test", None, cells


def choose_users(ids: np.ndarray, ranks: list[np.ndarray], number: int) -> list[tuple[int, str, str]]:
    """Users for the gallery: a third have the largest gains, a third the largest losses, the rest are drawn at random.

    Args:
        ids: numbers of the evaluated users, [users].
        ranks: their test ranks from 0 by the two models to compare; by a single one, all users are drawn at random.
        number: how many, or as many as there are.
    Returns:
        their numbers, why they are shown, and their gains in NDCG@20 in words where known
    """
    chosen: dict[int, str] = {}  # kinds by row
    if compared := len(ranks) == 2:
        before, after = ranks
        gains = user_values("NDCG@20", after) - user_values("NDCG@20", before)
        for sign, kind in ((1, "Largest gain"), (-1, "Largest loss")):
            order = np.lexsort((sign * (after - before), -sign * gains))  # equal gains: by the change of the rank
            chosen |= {int(row): kind for row in order[: number // 3] if sign * gains[row] > 0}
    rest = [int(row) for row in np.random.default_rng(0).permutation(len(ids)) if int(row) not in chosen]
    chosen |= dict.fromkeys(rest[: number - len(chosen)], "Drawn at random")
    return [(int(ids[row]), kind, f"{gains[row]:+.2f}" if compared else "") for row, kind in chosen.items()]


def _settings(summaries: list[dict[str, Any]]) -> list[tuple[str, list[tuple[str, list[str], bool]]]]:
    """What ran, as tables: their captions, and a name, a value a run and whether the values differ for each row."""
    tables = []
    for section, caption in SETTINGS.items():
        rows = []
        for name in dict.fromkeys(name for summary in summaries for name in summary.get(section, {})):
            values = [_format_setting(summary.get(section, {}).get(name)) for summary in summaries]
            rows.append((name.replace("_", " "), values, len(set(values)) > 1))
        if section == "versions":
            rows.append(("device", [summary["device"] for summary in summaries], False))
        tables.append((caption, rows))
    return tables


def _format_setting(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.1f}" if value >= 10 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _attention_items(parts: Sequence[RunPart], page: Page, number: int) -> list[int]:
    """Items to show attention for: typical ones, group by group, then those that most cards mention."""
    typical = [[item for item, *_ in group["typical"]] for part in parts for group in part.groups]
    first = [item for items in zip_longest(*typical) for item in items if item is not None]
    others = sorted(page.items, key=lambda item: -len(page.items[item].mentions))
    return list(dict.fromkeys([*first, *others]))[:number]


def write_report(folders: Sequence[Path], path: Path, place: dict[str, Any], users: int, items: int) -> None:
    """Write a page that shows finished runs of one data set.

    Args:
        place: as `open_finished` takes it.
        users, items: how many users' recommendations and how many items' attention to show.
    Raises:
        PerPEFTError: a run is not finished, its data is missing or has changed, or the runs are of different data.
    """
    if len(folders) > len(ascii_uppercase):  # which name them
        raise PerPEFTError(f"{len(folders)} runs are more than the {len(ascii_uppercase)} that a report compares; name fewer")
    fingerprints = {finished_options(folder, **place)[1]["dataset_fingerprint"] for folder in folders}
    if len(fingerprints) > 1:  # before minutes of encoding
        raise PerPEFTError("the runs are of different data sets; a report compares runs of one")
    names = ascii_uppercase if len(folders) > 1 else [""]
    parts = [RunPart(folder, place, name) for folder, name in zip(folders, names)]
    first, others = parts[0], parts[1:]
    dataset = first.run.dataset
    page = Page(dataset, f"{'Runs' if others else 'A run'} of {dataset.name}")
    for part in parts:
        if len(part.stages) == 2:
            part.show_groups(page)
    results = [row for part in parts for row in part.results()]
    results += [_difference_row(f"{part.name} − {first.name}", first.test_ranks[-1], part.test_ranks[-1]) for part in others]
    # A user's gain is the second run's over the first's, or the second stage's of the only run.
    compared = [part.test_ranks[-1] for part in parts[:2]] if others else first.test_ranks
    chosen_users = choose_users(first.ranks[0]["users"], compared, users)
    for user, kind, gain in tqdm(chosen_users, "users", unit="user", disable=None):
        person = known_user(first.run, user)
        rankings = [(part.name, ranking) for part in parts for ranking in part.recommender.recommend(person, TOP_K)]
        page.add_user(person, rankings, TOP_K, kind, gain)
    explained = _attention_items(parts, page, items)
    for part in parts:
        if part.options.peft_type in PEFT_TYPES and explained:
            try:
                for explanation in explain_items(part.options, dataset, part.folder, explained):
                    page.add_attention(explanation, part.name)
            except PerPEFTError as error:  # some models cannot show it
                print(f"note: {error}", file=sys.stderr)
    for card in page.items.values():
        card.counts = "; ".join(dict.fromkeys(part.counts_of(card.item) for part in parts))
    page.write(path, runs=parts, metrics=METRICS, results=results, settings=_settings([part.summary for part in parts]))
