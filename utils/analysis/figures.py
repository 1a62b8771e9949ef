"""The figures of a report: users on a map and gains by group; and any figure as inline SVG in the page's own colours."""
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from utils.analysis.groups import Interval

INK, RULE = "#010203", "#040506"  # stand for the page's colours of text and of lines, which differ in light and dark
STYLE = {
    "svg.fonttype": "none", "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.edgecolor": RULE, "grid.color": RULE, "axes.facecolor": "none", "figure.facecolor": "none",
    "legend.facecolor": "none", "legend.edgecolor": RULE, "axes.spines.top": False, "axes.spines.right": False,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.prop_cycle": "cycler('color', ['#4477aa'])",
}  # fmt: skip


def inline_svg(name: str, description: str, plot: Callable[..., None], *arguments: Any, height: float = 4.0) -> Markup:
    """Draw a plot as an SVG element that takes its colours from the page, without any reference beyond it.

    Args:
        name: prefix of the ids inside, different for every figure of a page.
        description: what a screen reader says instead of it.
        plot: called with axes and `arguments`.
        height: inches.
    """
    text = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(6.6, height), layout="constrained")
        plot(figure.subplots(), *arguments)
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    body = svg[svg.index(">", svg.index("<svg")) + 1 :].replace("xlink:href", "href")
    box = re.search(r'viewBox="([^"]+)"', svg).group(1)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'href="#|url\(#', lambda found: f"{found[0]}{name}-", body)
    body = body.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    width = 1.35 * float(box.split()[2])
    return Markup(f'<svg role="img" aria-label="{escape(description)}" viewBox="{box}" style="max-width:{width:.0f}px">{body}')


def group_colours(num_groups: int) -> list[str]:
    """A colour a group, as distinct as so many can be, as hex."""
    if num_groups <= 20:
        colours = colormaps["tab10" if num_groups <= 10 else "tab20"].colors[:num_groups]
    else:
        colours = [colormaps["hsv"](group / num_groups) for group in range(num_groups)]
    return [to_hex(colour) for colour in colours]


def plot_users(axes: Axes, vectors: np.ndarray, groups: np.ndarray, num_groups: int) -> None:
    """Users in the plane of most variance, coloured by group; `vectors` are those that they were grouped by, [users, hidden]."""
    if vectors.shape[1] == 1:  # of a recommender one number wide; the plane then is a line
        vectors = np.pad(vectors, ((0, 0), (0, 1)))
    pca = PCA(2, random_state=0).fit(vectors)
    # in no order, so that no group lies on top; more would only hide each other
    shown = np.random.default_rng(0).permutation(len(vectors))[:2_000]
    points, colours = pca.transform(vectors[shown]), group_colours(num_groups)
    size = float(np.clip(9000 / len(shown), 5, 30))
    axes.scatter(*points.T, s=size, c=[colours[group] for group in groups[shown]], alpha=0.6, linewidths=0)
    for group in np.unique(groups):
        centre = pca.transform(vectors[groups == group].mean(0, keepdims=True))[0]
        box = {"boxstyle": "circle", "facecolor": colours[group], "edgecolor": "white"}
        axes.text(*centre, str(group), color="white", weight="bold", fontsize=9, ha="center", va="center", bbox=box)
    shares = 100 * pca.explained_variance_ratio_
    axes.set(xlabel=f"first principal component ({shares[0]:.0f} % of variance)", ylabel=f"second ({shares[1]:.0f} %)")
    axes.grid(alpha=0.5)


def plot_gains(axes: Axes, labels: Sequence[str], gains: Sequence[Interval]) -> None:
    """Gains in percentage points with their intervals, one line each; the last, of all users, in the text's colour."""
    for place, gain in enumerate(gains):
        colour = INK if place == len(gains) - 1 else "#4477aa"
        if np.isfinite(gain.low):
            axes.plot([100 * gain.low, 100 * gain.high], [place, place], color=colour, lw=2)
        if gain.users:
            axes.plot(100 * gain.mean, place, "o", color=colour)
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("percentage points of test NDCG@20")
    axes.grid(alpha=0.5, axis="x")
