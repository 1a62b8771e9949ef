"""The paper's Tables 2 and 3 from finished runs, as Markdown, CSV and LaTeX: means, deviations, the paper's figures, a test."""
import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import ttest_rel

from utils.files import write_text_atomically
from utils.reproduction import PERPEFT, PlannedRun, methods_of

SHOWN = ("HR@20", "HR@30", "NDCG@20", "NDCG@30")
PAPER_FILE = Path(__file__).with_name("paper_results.csv")
TITLES = {2: "Comparison of methods", 3: "Ablations"}


@dataclass(frozen=True)
class Row:
    """One method's figures in percent.

    Attributes:
        method: the paper's name of it.
        trials: how many finished runs the figures are of.
        mean, deviation: by metric; the sample standard deviation over trials, NaN of a single one.
        paper: the paper's figures where it has some.
        valid: mean validation NDCG@20, by which the strongest is chosen.
        gains: each user's test NDCG@20 as a fraction, averaged over trials, [users].
    """

    method: str
    trials: int
    mean: dict[str, float]
    deviation: dict[str, float]
    paper: dict[str, float]
    valid: float
    gains: np.ndarray


@dataclass(frozen=True)
class Block:
    """One table for one kind of adapter."""

    table: int
    peft_type: str
    rows: list[Row]

    def best(self, metric: str) -> float:
        """The highest mean."""
        return max(row.mean[metric] for row in self.rows)

    def significance(self) -> str:
        """PerPEFT against the strongest other row, chosen by validation: a paired t-test over users, in words."""
        ours = [row for row in self.rows if row.method == PERPEFT]
        others = [row for row in self.rows if row.method != PERPEFT]
        if not ours or not others:
            return "No test: PerPEFT or what it is compared with has no finished run yet."
        strongest = max(others, key=lambda row: row.valid)
        difference, p = paired_test(ours[0].gains, strongest.gains)
        told = "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}" if np.isfinite(p) else "p is not defined: no user differs"
        return (
            f"PerPEFT against {strongest.method}, the strongest other row by validation NDCG@20: test NDCG@20 "
            f"{100 * difference:+.2f} points, {told} (paired t-test over {len(strongest.gains)} users, averaged over trials)."
        )


def paired_test(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Mean difference and two-sided p of a paired t-test, over users, [users] each; p is NaN where no user differs."""
    difference = ours - theirs
    return float(difference.mean()), float(ttest_rel(ours, theirs).pvalue) if difference.any() else float("nan")


def paper_figures(table: int, peft_type: str, method: str, dataset: str) -> dict[str, float]:
    """The paper's figures in percent by metric; empty where it has none."""
    with PAPER_FILE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # PerPEFT stands in Table 2 alone, and methods without an adapter under N/A
    wanted = [(str(table), peft_type), ("2", peft_type), (str(table), "N/A")]
    for place in wanted:
        for row in rows:
            if (row["table"], row["peft"]) == place and (row["method"], row["dataset"]) == (method, dataset):
                return {metric: float(row[metric]) for metric in SHOWN}
    return {}


def gains_at_20(ranks: np.ndarray) -> np.ndarray:
    """Each user's NDCG@20, a fraction, from ranks counted from 0."""
    return np.where(ranks < 20, 1 / np.log2(ranks + 2.0), 0.0)


def _row(runs: list[PlannedRun], paper: dict[str, float]) -> Row:
    summaries = [run.summary()[run.method.stage] for run in runs]
    values = {metric: np.array([100 * summary["test"][metric] for summary in summaries]) for metric in SHOWN}
    return Row(
        runs[0].method.name,
        len(runs),
        {metric: float(each.mean()) for metric, each in values.items()},
        {metric: float(each.std(ddof=1)) if len(each) > 1 else float("nan") for metric, each in values.items()},
        paper,
        float(np.mean([summary["valid"]["NDCG@20"] for summary in summaries])),
        np.mean([gains_at_20(run.ranks()["test"]) for run in runs], axis=0),
    )


def blocks_of(runs: list[PlannedRun], tables: list[int], peft_types: list[str], dataset: str) -> list[Block]:
    """The tables as far as runs are finished; a table without any is left out."""
    finished = [run for run in runs if run.summary()]
    blocks = []
    for table in tables:
        for peft_type in peft_types:
            rows = []
            for method in methods_of(table, peft_type):
                of_adapter = {peft_type} if method.peft_types else set(peft_types)
                mine = [run for run in finished if run.method == method and run.peft_type in of_adapter]
                if mine:
                    rows.append(_row(mine, paper_figures(table, peft_type, method.name, dataset)))
            if rows:
                blocks.append(Block(table, peft_type, rows))
    return blocks


def write_tables(folder: Path, dataset: str, blocks: list[Block], trials: int) -> None:
    """Write `{dataset}.md`, `.csv` and `.tex`."""
    folder.mkdir(parents=True, exist_ok=True)
    for ending, text in (("md", markdown(dataset, blocks, trials)), ("csv", as_csv(blocks)), ("tex", latex(dataset, blocks))):
        write_text_atomically(folder / f"{dataset}.{ending}", text)


def _told(row: Row, metric: str) -> str:
    deviation = row.deviation[metric]
    return f"{row.mean[metric]:.2f}" + (f" ({deviation:.2f})" if np.isfinite(deviation) else "")


def markdown(dataset: str, blocks: list[Block], trials: int) -> str:
    """For people: mean (standard deviation) in percent, the best of a column in bold, the paper's figure beside it."""
    what = "Test figures in percent at the best epoch by validation NDCG@20: mean (standard deviation) over trials."
    parts = [f"# {dataset}", what]
    for block in blocks:
        with_paper = any(row.paper for row in block.rows)
        columns = [name for metric in SHOWN for name in ([metric, "paper"] if with_paper else [metric])]
        lines = [f"| method | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
        for row in block.rows:
            cells = []
            for metric in SHOWN:
                told = _told(row, metric)
                cells.append(f"**{told}**" if row.mean[metric] == block.best(metric) else told)
                if with_paper:
                    cells.append(f"{row.paper[metric]:.2f}" if row.paper else "")
            partly = "" if row.trials == trials else f" [{row.trials} of {trials} trials]"
            lines.append(f"| {row.method}{partly} | {' | '.join(cells)} |")
        heading = f"## Table {block.table}, {block.peft_type}: {TITLES[block.table].lower()}"
        parts += [heading, "\n".join(lines), block.significance()]
    return "\n\n".join(parts) + "\n"


def as_csv(blocks: list[Block]) -> str:
    """For programs: a line a row, means and deviations in percent, empty where there are none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{metric}{ending}" for metric in SHOWN for ending in ("", "_sd", "_paper")]
    writer.writerow(["table", "peft", "method", "trials", *columns])
    for block in blocks:
        for row in block.rows:
            figures = [(row.mean[metric], row.deviation[metric], row.paper.get(metric, float("nan"))) for metric in SHOWN]
            cells = [f"{value:.4f}" if np.isfinite(value) else "" for each in figures for value in each]
            writer.writerow([block.table, block.peft_type, row.method, row.trials, *cells])
    return text.getvalue()


def latex(dataset: str, blocks: list[Block]) -> str:
    """For papers: one booktabs tabular a block."""
    name = dataset.replace("_", r"\_")
    parts = []
    for block in blocks:
        lines = [
            f"% Table {block.table}, {block.peft_type}, {name}: percent, mean (standard deviation); \\usepackage{{booktabs}}",
            r"\begin{tabular}{l" + "r" * len(SHOWN) + "}",
            r"\toprule",
            " & ".join(["Method", *SHOWN]) + r" \\",
            r"\midrule",
        ]
        for row in block.rows:
            told = {metric: _told(row, metric) for metric in SHOWN}
            cells = [rf"\textbf{{{told[m]}}}" if row.mean[m] == block.best(m) else told[m] for m in SHOWN]
            lines.append(" & ".join([row.method, *cells]) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"
