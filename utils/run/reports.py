"""The files and lines that a run reports: metrics.csv, summary.json, groups.csv, ranks, the results table.

Reading a file that is missing or damaged raises a PerPEFTError.
"""
import csv
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from utils.common.errors import PerPEFTError
from utils.common.files import write_text_atomically
from utils.training.evaluation import METRICS, SPLITS, Ranks
from utils.training.progress import best_row

METRIC_COLUMNS = ("stage", "epoch", "train_loss", "seconds", *(f"{split}_{name}" for split in SPLITS for name in METRICS))


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write metrics.csv, a row an epoch; it is whole at any moment."""
    rounded = [{**row, "seconds": f"{row['seconds']:.2f}"} for row in rows]
    _write_table(path, METRIC_COLUMNS, ([row[name] for name in METRIC_COLUMNS] for row in rounded))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv, numbers as numbers."""
    return _read_table(path, dict.fromkeys(METRIC_COLUMNS, float) | {"stage": str, "epoch": int})


def _write_table(path: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write names and numbers as CSV."""
    write_text_atomically(path, "".join(",".join(map(str, row)) + "\n" for row in (columns, *rows)))


def _read_table(path: Path, columns: dict[str, type]) -> list[dict[str, Any]]:
    """The rows of a CSV file, each column's values of a type."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [{name: kind(row[name]) for name, kind in columns.items()} for row in csv.DictReader(file)]
    except (KeyError, OSError, TypeError, ValueError, csv.Error) as error:
        raise PerPEFTError(f"{path} cannot be read ({error}); train this run again with --restart") from error


def write_groups(path: Path, user_ids: np.ndarray, groups: np.ndarray) -> None:
    """Write groups.csv: user, group."""
    _write_table(path, ("user", "group"), zip(user_ids.tolist(), groups.tolist()))


def read_groups(path: Path) -> np.ndarray:
    """Each user row's group from groups.csv, [users]."""
    return np.array([row["group"] for row in _read_table(path, {"group": int})], dtype=np.int64)


def write_ranks(path: Path, user_ids: np.ndarray, ranks: Ranks) -> None:
    """Write user, valid_rank, test_rank, from 0; for tests of significance and figures by group."""
    columns = (column.tolist() for column in (user_ids[ranks.users], ranks.valid, ranks.test))
    _write_table(path, ("user", "valid_rank", "test_rank"), zip(*columns))


def read_ranks(path: Path) -> dict[str, np.ndarray]:
    """A file of `write_ranks`: {"users": their numbers, "valid": ranks, "test": ranks}, [users] each."""
    columns = {"users": "user", "valid": "valid_rank", "test": "test_rank"}
    rows = _read_table(path, dict.fromkeys(columns.values(), int))
    return {name: np.array([row[column] for row in rows], dtype=np.int64) for name, column in columns.items()}


def stage_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Best epoch by valid NDCG@20 and its metrics as fractions."""
    best = best_row(rows)
    return {"best_epoch": best["epoch"]} | {split: {name: best[f"{split}_{name}"] for name in METRICS} for split in SPLITS}


def versions() -> dict[str, str]:
    """Versions of what the figures may depend on."""
    libraries = ("torch", "transformers", "peft", "numpy", "scikit-learn")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in libraries}


def print_results(summary: dict[str, Any], folder: Path) -> None:
    """Print the results table, global and personalized, in percent as in the paper, and the run folder."""
    lines = [f"{'':<16}{'split':<7}" + "".join(f"{name:>9}" for name in METRICS) + "   best epoch"]
    for stage in [stage for stage in ("global", "personalized") if stage in summary]:
        for split in SPLITS:
            values = "".join(f"{100 * summary[stage][split][name]:>9.2f}" for name in METRICS)
            lines.append(f"{stage:<16}{split:<7}{values}   {summary[stage]['best_epoch']:>10}")
    print("", *lines, f"(percent) {folder}", sep="\n", flush=True)


def format_epoch(rows: list[dict[str, Any]], epochs: int) -> str:
    """One line about a stage's last epoch."""
    row = rows[-1]
    mark = " (best so far)" if best_row(rows) is row else ""
    skipped = f", {row['skipped_steps']} steps skipped for fp16 overflow" if row["skipped_steps"] else ""
    metrics = f"valid HR@20 {100 * row['valid_HR@20']:.2f} NDCG@20 {100 * row['valid_NDCG@20']:.2f}"
    loss = f"{row['stage']} epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}"
    return f"{loss}, {metrics}{mark}, {row['seconds']:.1f} s{skipped}"
