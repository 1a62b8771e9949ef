"""The two plots that a training run keeps up to date: its curves and the sizes of its groups."""
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.common.files import write_atomically
from utils.training.progress import best_row


def _save_png(path: Path, figure: Figure) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _stages(rows: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]], list[int]]]:
    """Each stage's name, colour, rows, and epochs counted on from the stage before."""
    stages, first = [], 0
    for stage, colour in (("global", "tab:gray"), ("personalized", "tab:blue")):
        own = [row for row in rows if row["stage"] == stage]
        if own:
            stages.append((stage, colour, own, [first + row["epoch"] for row in own]))
            first += own[-1]["epoch"]
    return stages


def plot_loss(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Training loss over the epochs of both stages; `rows` as in metrics.csv."""
    for stage, colour, own, epochs in _stages(rows):
        axes.plot(epochs, [row["train_loss"] for row in own], color=colour, marker=".", label=stage)
    axes.set(xlabel="epoch", ylabel="training loss")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def plot_ndcg(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """NDCG@20 over the epochs of both stages, the best epochs marked; `rows` as in metrics.csv."""
    for stage, colour, own, epochs in _stages(rows):
        for split, style in (("valid", "-"), ("test", ":")):
            values = [row[f"{split}_NDCG@20"] for row in own]
            axes.plot(epochs, values, style, color=colour, marker=".", label=f"{stage}, {split}")
        best = best_row(own)
        axes.plot(epochs[own.index(best)], best["valid_NDCG@20"], "*", color="tab:red", markersize=11)
    axes.set(xlabel="epoch (star: best by valid)", ylabel="NDCG@20")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def draw_curves(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write both curves side by side."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, plot in zip(figure.subplots(1, 2), (plot_loss, plot_ndcg)):
        plot(axes, rows)
    _save_png(path, figure)


def draw_groups(path: Path, sizes: list[int]) -> None:
    """Write how many users each group has."""
    figure = Figure(figsize=(1.5 + 0.6 * len(sizes), 3), layout="constrained")
    axes = figure.subplots()
    axes.bar_label(axes.bar(range(len(sizes)), sizes, color="tab:blue"), fontsize="small")
    axes.set(xlabel="group", ylabel="users", xticks=range(len(sizes)))
    axes.margins(y=0.15)
    _save_png(path, figure)
