"""Contact sheets: rows of item images with their titles, and how every figure of a run is saved."""
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from utils.common.files import write_atomically
from utils.data.dataset import Dataset
from utils.data.images import decoded_image

DOTS = 110  # an inch
IMAGE_EDGE = 150  # pixels of a shown image
# Lengths in inches from here on.
EDGE, GAP = 1.15, 0.15  # of an image, and between images
LABEL_WIDTH = 1.75
LINE = 0.125  # height of a line of small text
TITLE_LINES, TITLE_LETTERS = 3, 19
SMALL, NORMAL = 7, 9  # points


@dataclass(frozen=True)
class Tile:
    """An image, the title below it, a note below that, and whether it is framed."""

    image: np.ndarray
    title: str
    note: str = ""
    framed: bool = False


@dataclass(frozen=True)
class SheetRow:
    """What stands at the left of a row (lines), its tiles, and a share in [0, 1] that a bar shows."""

    label: str
    tiles: Sequence[Tile]
    share: float | None = None
    when_empty: str = "nothing to show"


def cut_title(title: str, letters: int = TITLE_LETTERS, lines: int = TITLE_LINES) -> str:
    """A title in a few lines of bounded length; what does not fit gives way to an ellipsis."""
    plain = "".join(letter if letter.isprintable() else " " for letter in title)
    return "\n".join(textwrap.wrap(plain, letters, max_lines=lines, placeholder="…"))


def thumbnail(path: Path, edge: int = IMAGE_EDGE) -> np.ndarray:
    """An image fitted whole into a white square, uint8 [edge, edge, 3]; a grey square where none can be read."""
    try:
        with decoded_image(path, edge) as image:
            return np.asarray(ImageOps.pad(image, (edge, edge), color="white"))
    except (OSError, ValueError):
        return np.asarray(Image.new("RGB", (edge, edge), "lightgray"))


def item_tile(dataset: Dataset, item: int, note: str = "", framed: bool = False) -> Tile:
    """An item of a data set as a tile."""
    return Tile(thumbnail(dataset.image_paths[item - 1]), dataset.titles[item - 1], note, framed)


def save_figure(path: str | Path, figure: Figure) -> None:
    """Write a figure as PNG, whole or not at all; its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # titles in letters that the font lacks become boxes
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=DOTS))


def inch_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure and axes without frame whose units are inches, (0, 0) at the upper left."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_autoscale_on(False)
    axes.axis("off")
    return figure, axes


def write_text(axes: Axes, x: float, y: float, text: str, size: float = SMALL, **look: object) -> None:
    """Write a text downwards from (x, y), letter for letter: a title's dollar signs begin no formula."""
    axes.text(x, y, text, fontsize=size, parse_math=False, **{"va": "top", **look})


def draw_image(axes: Axes, image: np.ndarray, left: float, top: float) -> None:
    """Draw an image [height, width, 3] as a square with EDGE a side."""
    axes.imshow(image, extent=(left, left + EDGE, top + EDGE, top), interpolation="antialiased", aspect="auto")


def draw_sheet(path: str | Path, heading: str, rows: Sequence[SheetRow], footnote: str = "") -> None:
    """Draw rows of tiles, a heading above and a footnote below.

    Args:
        path: the PNG to write.
        heading, footnote: any number of lines.
        rows: of any lengths.
    """
    columns = max(3, *(len(row.tiles) for row in rows))
    width = LABEL_WIDTH + columns * (EDGE + GAP) + GAP
    tops = 0.3 + 0.18 * len(heading.splitlines()) + np.cumsum([0, *map(_row_height, rows)])
    figure, axes = inch_axes(width, tops[-1] + 0.2 * bool(footnote) + 0.15 * len(footnote.splitlines()))
    write_text(axes, GAP, 0.15, heading, NORMAL + 1, weight="bold")
    for row, top in zip(rows, tops):
        _draw_row(axes, row, top)
    write_text(axes, GAP, tops[-1], footnote, SMALL, color="dimgray", linespacing=1.4)
    save_figure(path, figure)


def _row_height(row: SheetRow) -> float:
    lines = max((len(cut_title(tile.title).splitlines()) + bool(tile.note) for tile in row.tiles), default=0)
    return EDGE + lines * LINE + 2 * GAP


def _draw_row(axes: Axes, row: SheetRow, top: float) -> None:
    write_text(axes, GAP, top, row.label, NORMAL, linespacing=1.35)
    if row.share is not None:
        y, whole = top + 0.08 + 0.185 * len(row.label.splitlines()), LABEL_WIDTH - 3 * GAP
        axes.add_patch(Rectangle((GAP, y), whole, 0.1, color="gainsboro", lw=0))
        axes.add_patch(Rectangle((GAP, y), whole * row.share, 0.1, color="tab:blue", lw=0))
    if not row.tiles:
        write_text(axes, LABEL_WIDTH, top, row.when_empty, NORMAL, color="dimgray")
    for column, tile in enumerate(row.tiles):
        _draw_tile(axes, tile, LABEL_WIDTH + column * (EDGE + GAP), top)


def _draw_tile(axes: Axes, tile: Tile, left: float, top: float) -> None:
    draw_image(axes, tile.image, left, top)
    look = {"edgecolor": "tab:red", "lw": 3} if tile.framed else {"edgecolor": "silver", "lw": 0.6}
    axes.add_patch(Rectangle((left, top), EDGE, EDGE, fill=False, **look))
    title = cut_title(tile.title)
    write_text(axes, left, top + EDGE + 0.06, title, linespacing=1.15)
    if tile.note:
        below = top + EDGE + 0.06 + LINE * len(title.splitlines())
        write_text(axes, left, below, tile.note, color="dimgray")
