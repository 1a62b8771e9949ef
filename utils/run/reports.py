"""The files and lines that a run reports: metrics.csv, summary.json, groups.csv, ranks, curves, the closing table."""
import csv
import io
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from models import PerPEFT
from utils.common.errors import PerPEFTError
from utils.common.files import write_text_atomically
from utils.run.build import trainable_counts
from utils.run.settings import FINGERPRINTS
from utils.training.evaluation import METRICS, Ranks
from utils.training.progress import best_row

SPLIT_METRICS = tuple(f"{split}_{name}" for split in ("valid", "test") for name in METRICS)
METRIC_COLUMNS = ("stage", "epoch", "train_loss", "seconds", *SPLIT_METRICS)


def write_metrics(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write metrics.csv, a row an epoch; it is whole at any moment."""
    text = io.StringIO()
    writer = csv.DictWriter(text, METRIC_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "seconds": f"{row['seconds']:.2f}"})
    write_text_atomically(path, text.getvalue())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.csv, numbers as numbers."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: value if name == "stage" else int(value) if name == "epoch" else float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def write_groups(path: Path, user_ids: np.ndarray, groups: np.ndarray) -> None:
    """Write groups.csv: user, group."""
    lines = [f"{user},{group}\n" for user, group in zip(user_ids.tolist(), groups.tolist())]
    write_text_atomically(path, "user,group\n" + "".join(lines))


def read_groups(path: Path) -> np.ndarray:
    """Each user row's group from groups.csv, [users].

    Raises:
        PerPEFTError: it is missing or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an empty file, which fails right after
            return np.loadtxt(path, dtype=np.int64, delimiter=",", skiprows=1, ndmin=2)[:, 1]
    except (IndexError, OSError, ValueError) as error:
        raise PerPEFTError(f"{path} cannot be read ({error}); start over with --restart") from error


def write_ranks(path: Path, user_ids: np.ndarray, ranks: Ranks) -> None:
    """Write user, valid_rank, test_rank, from 0; for tests of significance and figures by group."""
    rows = zip(user_ids[ranks.users].tolist(), ranks.valid.tolist(), ranks.test.tolist())
    write_text_atomically(path, "user,valid_rank,test_rank\n" + "".join(f"{user},{valid},{test}\n" for user, valid, test in rows))


def read_ranks(path: Path) -> dict[str, np.ndarray]:
    """A file of `write_ranks`: {"users": their numbers, "valid": ranks, "test": ranks}, [users] each.

    Raises:
        PerPEFTError: it is missing or damaged.
    """
    try:
        table = np.loadtxt(path, dtype=np.int64, delimiter=",", skiprows=1, ndmin=2)
        return dict(zip(("users", "valid", "test"), table.reshape(-1, 3).T))
    except (OSError, ValueError) as error:
        raise PerPEFTError(f"{path} cannot be read ({error}); train this run again with --restart") from error


def stage_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Best epoch by valid NDCG@20 and its metrics as fractions."""
    best = best_row(rows)
    return {"best_epoch": best["epoch"]} | {
        split: {name: best[f"{split}_{name}"] for name in METRICS} for split in ("valid", "test")
    }


def versions() -> dict[str, str]:
    """Versions of what the figures may depend on."""
    import peft
    import sklearn
    import torch
    import transformers

    libraries = {"torch": torch, "transformers": transformers, "peft": peft, "numpy": np, "scikit-learn": sklearn}
    return {"python": platform.python_version()} | {name: library.__version__ for name, library in libraries.items()}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write readable JSON, whole or not at all."""
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


def draw_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw the training curves as PNG, as `curves_figure`."""
    from utils.run import plots  # matplotlib takes a while to import

    plots.save_png(path, plots.curves_figure(rows))


def draw_groups(path: Path, sizes: list[int]) -> None:
    """Draw how many users each group has as PNG."""
    from utils.run import plots

    plots.save_png(path, plots.group_sizes_figure(sizes))


def results_table(summary: dict[str, Any]) -> str:
    """Global against personalized, valid and test, in percent as the paper prints them."""
    lines = [f"{'':<16}{'split':<7}" + "".join(f"{name:>9}" for name in METRICS) + "   best epoch"]
    for stage in [stage for stage in ("global", "personalized") if stage in summary]:
        for split in ("valid", "test"):
            values = "".join(f"{100 * summary[stage][split][name]:>9.2f}" for name in METRICS)
            lines.append(f"{stage:<16}{split:<7}{values}   {summary[stage]['best_epoch']:>10}")
    return "\n".join(lines)


def print_results(summary: dict[str, Any], folder: Path) -> None:
    """Print the closing table and the run folder."""
    print(f"\n{results_table(summary)}\n(percent) {folder}", flush=True)


def format_epoch(rows: list[dict[str, Any]], epochs: int) -> str:
    """One line about a stage's last epoch."""
    row = rows[-1]
    mark = " (best so far)" if best_row(rows) is row else ""
    skipped = f", {row['skipped_steps']} steps skipped for fp16 overflow" if row["skipped_steps"] else ""
    return (
        f"{row['stage']} epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, "
        f"valid HR@20 {100 * row['valid_HR@20']:.2f} "
        f"NDCG@20 {100 * row['valid_NDCG@20']:.2f}{mark}, {row['seconds']:.1f} s{skipped}"
    )


def run_summary(
    settings: dict[str, Any], model: PerPEFT, rows: dict[str, list[dict[str, Any]]], grouping_seconds: float
) -> dict[str, Any]:
    """The part of summary.json that does not depend on the machine and the data.

    Args:
        settings: of the run, fingerprints included.
        model: as it was trained.
        rows: of each stage's epochs.
        grouping_seconds: of stage 2.
    """
    sizes = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in ("sasrec", "projectors")}
    return {
        "config": {name: value for name, value in settings.items() if name not in FINGERPRINTS},
        "versions": versions(),
        **{name: settings[name] for name in FINGERPRINTS},
        "trainable_parameters": {**sizes, **trainable_counts(model.encoder)},
        "seconds": {
            "global": sum(row["seconds"] for row in rows["global"]),
            "grouping": grouping_seconds,
            "personalized": sum(row["seconds"] for row in rows["personalized"]),
        },
        "skipped_steps": {stage: sum(row["skipped_steps"] for row in own) for stage, own in rows.items()},
        **{stage: stage_summary(own) for stage, own in rows.items() if own},
    }
