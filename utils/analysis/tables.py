"""The paper's Tables 2 and 3 from finished runs, as Markdown, CSV and LaTeX: means, deviations, the paper's values, a test."""
import contextlib
import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import ttest_rel

from utils.analysis.reproduction import ADAPTERS, PERPEFT, TABLES, Method, OtherSettings, PlannedRun, methods_of, plan_runs
from utils.common.errors import PerPEFTError
from utils.common.files import write_text_atomically
from utils.run.reports import read_ranks
from utils.training.evaluation import user_values

SHOWN = ("HR@20", "HR@30", "NDCG@20", "NDCG@30")
TITLES = {2: "comparison of methods", 3: "ablations"}


class Row(NamedTuple):
    """One method's metrics in percent, by name."""

    method: str
    mean: dict[str, float]
    deviation: dict[str, float]  # of the sample of trials; NaN of a single one
    paper: dict[str, float]  # the paper's values, where it has some
    valid: float  # mean validation NDCG@20, which chooses the strongest row
    user_ndcg: dict[int, np.ndarray]  # by finished trial, each evaluated user's test NDCG@20 as a fraction, [users]


class Comparison(NamedTuple):
    """PerPEFT against the strongest other row of a table, by validation, in test NDCG@20, over the trials that both have.

    The paired t-test takes the trained models as fixed: it is over users, each user's metrics averaged over trials.
    """

    strongest: str
    difference: float  # in points
    p: float  # two-sided; NaN where no user differs
    users: int
    trials: int

    def __str__(self) -> str:
        p = "p < 0.0001" if self.p < 1e-4 else f"p = {self.p:.4f}" if np.isfinite(self.p) else "no user differs"
        return (
            f"PerPEFT against {self.strongest}, the strongest other row by validation NDCG@20: test NDCG@20 "
            f"{self.difference:+.2f} points, {p} (paired t-test over {self.users} users, their metrics averaged over "
            f"{self.trials} trial{'s' if self.trials > 1 else ''}, the trained models taken as fixed)."
        )


class Block(NamedTuple):
    """One table for one kind of adapter."""

    table: int
    peft_type: str
    rows: list[Row]

    def comparison(self) -> Comparison | None:
        """PerPEFT against the strongest other row; None as long as they have no trial in common."""
        others = {row.method: row for row in self.rows}
        ours = others.pop(PERPEFT, None)
        if not ours or not others:
            return None
        strongest = max(others.values(), key=lambda row: row.valid)
        common = sorted(ours.user_ndcg.keys() & strongest.user_ndcg.keys())
        if not common:
            return None
        own, other = (np.mean([row.user_ndcg[trial] for trial in common], axis=0) for row in (ours, strongest))  # [users] each
        p = float(ttest_rel(own, other).pvalue) if (own != other).any() else float("nan")
        return Comparison(strongest.method, float(100 * (own - other).mean()), p, len(own), len(common))


def paper_figures(table: int, peft_type: str, method: str, dataset: str) -> dict[str, float]:
    """The paper's values in percent by metric; empty where it has none."""
    with Path(__file__).with_name("paper_results.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["table"], row["peft"], row["method"], row["dataset"]): row for row in csv.DictReader(file)}
    # the paper has PerPEFT in Table 2 only, and methods without an adapter under N/A
    for place in ((str(table), peft_type), ("2", peft_type), (str(table), "N/A")):
        if row := rows.get((*place, method, dataset)):
            return {metric: float(row[metric]) for metric in SHOWN}
    return {}


def _row(method: Method, found: dict[PlannedRun, dict[str, Any]], paper: dict[str, float]) -> Row:
    """A row of finished runs of one method and their summaries."""
    stages = [summary[method.stage] for summary in found.values()]
    values = np.array([[100 * stage["test"][metric] for metric in SHOWN] for stage in stages])  # [trials, metrics]
    deviations = values.std(0, ddof=1) if len(values) > 1 else [np.nan] * len(SHOWN)
    valid = float(np.mean([stage["valid"]["NDCG@20"] for stage in stages]))
    ranks = {run.trial: read_ranks(run.folder / f"{method.stage}_ranks.csv")["test"] for run in found}
    user_ndcg = {trial: user_values("NDCG@20", each) for trial, each in ranks.items()}
    return Row(method.name, dict(zip(SHOWN, values.mean(0))), dict(zip(SHOWN, deviations)), paper, valid, user_ndcg)


def blocks_of(runs: list[PlannedRun], dataset: str) -> list[Block]:
    """The tables as far as runs are finished; a table without any finished run of its own adapter is left out.

    Raises:
        PerPEFTError: the data set has changed between runs, or a summary or a file of ranks is damaged.
    """
    found: dict[PlannedRun, dict[str, Any]] = {}
    for run in runs:
        with contextlib.suppress(OtherSettings):  # which do not belong to these tables
            if summary := run.summary():
                found[run] = summary
    if len({summary["dataset_fingerprint"] for summary in found.values()}) > 1:
        raise PerPEFTError(f"the runs of {dataset} used different data: its files have changed between them; train them again")
    blocks = []
    for table in TABLES:
        for peft_type in ADAPTERS:
            rows, has_own = [], False
            for method in methods_of(table, peft_type):
                alike = [run for run in found if run.method == method and (not method.peft_types or run.peft_type == peft_type)]
                if alike:
                    paper = paper_figures(table, peft_type, method.name, dataset)
                    rows.append(_row(method, {run: found[run] for run in alike}, paper))
                    has_own |= bool(method.peft_types) and (table == 2 or method.name != PERPEFT)
            if has_own:
                blocks.append(Block(table, peft_type, rows))
    return blocks


def finished_blocks(dataset: str, trials: int, passed_on: list[str]) -> list[Block]:
    """All tables and adapters of a data set with finished runs under these options; arguments as in `plan_runs`."""
    return blocks_of(plan_runs(dataset, list(TABLES), list(ADAPTERS), trials, passed_on), dataset)


def write_tables(folder: Path, dataset: str, blocks: list[Block], trials: int) -> None:
    """Write `{dataset}.md`, `.csv` and `.tex`."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"md": markdown(dataset, blocks, trials), "csv": as_csv(blocks), "tex": latex(dataset, blocks, trials)}
    for ending, text in texts.items():
        write_text_atomically(folder / f"{dataset}.{ending}", text)


def _cells(block: Block, trials: int, bold: str, blank: str = "") -> tuple[list[str], list[list[str]]]:
    """Column names and the cells of each row; the format `bold` marks the best of a metric."""
    with_paper = any(row.paper for row in block.rows)
    names = ["method", *(name for metric in SHOWN for name in ([metric, "paper"] if with_paper else [metric]))]
    best = {metric: max(row.mean[metric] for row in block.rows) for metric in SHOWN}
    lines = []
    for row in block.rows:
        done = len(row.user_ndcg)
        cells = [row.method if done == trials else f"{row.method} [{done} of {trials} trials]"]
        for metric in SHOWN:
            deviation = row.deviation[metric]
            text = f"{row.mean[metric]:.2f}" + (f" ({deviation:.2f})" if np.isfinite(deviation) else "")
            cells.append(bold.format(text) if row.mean[metric] == best[metric] else text)
            if with_paper:
                cells.append(f"{row.paper[metric]:.2f}" if row.paper else blank)
        lines.append(cells)
    return names, lines


def _format_comparison(block: Block) -> str:
    return str(block.comparison() or "No test yet: PerPEFT and the strongest other row have no finished trial in common.")


def markdown_table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A table as Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])


def markdown(dataset: str, blocks: list[Block], trials: int) -> str:
    """For readers: mean (standard deviation) in percent, the best of a column in bold, the paper's value beside it."""
    what = "Test metrics in percent at the best epoch by validation NDCG@20: mean (standard deviation) over trials."
    parts = [f"# {dataset}", what]
    for block in blocks:
        table = markdown_table(*_cells(block, trials, "**{}**"))
        parts += [f"## Table {block.table}, {block.peft_type}: {TITLES[block.table]}", table, _format_comparison(block)]
    return "\n\n".join(parts) + "\n"


def latex(dataset: str, blocks: list[Block], trials: int) -> str:
    """For papers: one booktabs tabular a table, with the same content."""
    parts = []
    for block in blocks:
        names, rows = _cells(block, trials, r"\textbf{{{}}}", "--")
        lines = [
            f"% {dataset}, table {block.table}, {block.peft_type}: percent, mean (standard deviation); \\usepackage{{booktabs}}",
            f"% {_format_comparison(block)}",
            rf"\begin{{tabular}}{{l{'r' * (len(names) - 1)}}}",
            r"\toprule",
            " & ".join(names) + r" \\",
            r"\midrule",
            *(" & ".join(cells) + r" \\" for cells in rows),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def as_csv(blocks: list[Block]) -> str:
    """For programs: one line a row, means and deviations in percent, the test on PerPEFT's line; missing values are empty."""
    columns = [f"{metric}{ending}" for metric in SHOWN for ending in ("", "_sd", "_paper")]
    lines = [["table", "peft", "method", "trials", *columns, "strongest_other", "difference", "p"]]
    for block in blocks:
        compared = block.comparison()
        for row in block.rows:
            figures = [(row.mean[metric], row.deviation[metric], row.paper.get(metric, float("nan"))) for metric in SHOWN]
            cells = [f"{value:.4f}" if np.isfinite(value) else "" for each in figures for value in each]
            test = ["", "", ""]
            if compared and row.method == PERPEFT:
                test = [compared.strongest, f"{compared.difference:.4f}", f"{compared.p:.3g}"]
            lines.append([str(block.table), block.peft_type, row.method, str(len(row.user_ndcg)), *cells, *test])
    return "".join(",".join(line) + "\n" for line in lines)
