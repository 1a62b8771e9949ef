"""The two plots that a training run keeps up to date: its curves and the sizes of its groups."""
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from utils.common.files import write_atomically
from utils.training.trainer import best_row

DOTS_PER_INCH = 110


def save_png(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH))


def curves_figure(rows: list[dict[str, Any]]) -> Figure:
    """Loss and NDCG@20 over the epochs of both stages, the best epochs marked; `rows` as in metrics.csv."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss_axes, metric_axes = figure.subplots(1, 2)
    first = 0
    for stage, colour in (("global", "tab:gray"), ("personalized", "tab:blue")):
        stage_rows = [row for row in rows if row["stage"] == stage]
        if not stage_rows:
            continue
        epochs = [first + row["epoch"] for row in stage_rows]
        loss_axes.plot(epochs, [row["train_loss"] for row in stage_rows], color=colour, marker=".", label=stage)
        for split, style in (("valid", "-"), ("test", ":")):
            values = [row[f"{split}_NDCG@20"] for row in stage_rows]
            metric_axes.plot(epochs, values, style, color=colour, marker=".", label=f"{stage}, {split}")
        best = best_row(stage_rows)
        metric_axes.plot(first + best["epoch"], best["valid_NDCG@20"], "*", color="tab:red", markersize=11)
        first = epochs[-1]
    loss_axes.set(xlabel="epoch", ylabel="training loss")
    metric_axes.set(xlabel="epoch (star: best by valid)", ylabel="NDCG@20")
    for axes in (loss_axes, metric_axes):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    return figure


def group_sizes_figure(sizes: list[int]) -> Figure:
    """How many users each group has."""
    figure = Figure(figsize=(1.5 + 0.6 * len(sizes), 3), layout="constrained")
    axes = figure.subplots()
    axes.bar_label(axes.bar(range(len(sizes)), sizes, color="tab:blue"), fontsize="small")
    axes.set(xlabel="group", ylabel="users", xticks=range(len(sizes)))
    axes.margins(y=0.15)
    return figure
