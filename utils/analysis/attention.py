"""What CLIP looks at in an item under each group's adapter: the words of its title and the patches of its image."""
import re
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from models import ClipPeftEncoder
from utils.analysis.sheets import (
    EDGE,
    GAP,
    IMAGE_EDGE,
    LABEL_WIDTH,
    NORMAL,
    SMALL,
    cut_title,
    draw_image,
    inch_axes,
    save_figure,
    write_text,
)
from utils.common.errors import PerPEFTError
from utils.data.images import decoded_image
from utils.items.foundation import INSIDE_CLIP, EncoderKind, Foundation, clip_folder, encoder_and_source, load_foundation
from utils.run.finished import finished_dataset, finished_options, item_number
from utils.run.pipeline import has_groups
from utils.run.reports import read_groups
from utils.training.evaluation import ItemSource

DARKEST = 0.2  # of the image's brightness, where nothing is looked at
LETTER = 0.0755  # inches, of the words' fixed-width font in NORMAL points
WORDS_WIDTH, WORD_HEIGHT, LINE_HEIGHT = 6.3, 0.2, 0.44  # inches; the width is the most that words may take
LEAST_WORDS_WIDTH = 3.7  # for the heading and the footnote
TITLE_LETTERS, TITLE_LINES = 45, 5
LONGEST_WORD = 60  # letters that are shown
FOOTNOTE = """Attention of the pooled position in CLIP's last layer, mean over heads: percent of that to all words
(in brackets: minus the global adapter's); the image is bright where it is looked at. One scale for all rows.
At the left: the share of a group's attention that lies elsewhere than under the global adapter."""


@dataclass(frozen=True)
class View:
    """How one adapter looks at an item.

    Attributes:
        label: whose adapter.
        words: each word's share of the attention to all words, [words]; None in runs that read no titles.
        patches: each patch's share of the attention to all patches, [rows, columns]; None in runs that see no images.
    """

    label: str
    words: np.ndarray | None
    patches: np.ndarray | None


@dataclass(frozen=True)
class Explanation:
    """An item as the global and every group's adapter see it.

    Attributes:
        heading: the item and the run, in words.
        title: the item's.
        words: of the title, as far as CLIP reads it.
        image: what CLIP sees of the image, uint8 [height, width, 3].
        views: the global adapter's first.
    """

    heading: str
    title: str
    words: list[str]
    image: np.ndarray
    views: list[View]


def words_of_tokens(title: str, offsets: list[tuple[int, int]]) -> tuple[list[str], np.ndarray]:
    """The words of a title, split at white space, and which of them each token is part of.

    Args:
        title: as it was tokenized.
        offsets: where each token begins and ends in the title; nothing for tokens that stand for no letters.
    Returns:
        the words as far as there are tokens, and each token's word, -1 for none, [tokens]
    """
    found = list(re.finditer(r"\S+", title))
    starts = [match.start() for match in found]
    places = np.array([bisect_right(starts, begin) - 1 if end > begin else -1 for begin, end in offsets], dtype=np.int64)
    return [match.group() for match in found[: places.max(initial=-1) + 1]], places


def _shares(attention: np.ndarray) -> np.ndarray:
    return attention / attention.sum()


@torch.no_grad()
def view_of(encoder: ClipPeftEncoder, inputs: tuple[torch.Tensor, ...], end_of_text: int, places: np.ndarray, label: str) -> View:
    """How an encoder's present adapter looks at one item.

    It is the last layer's attention, the mean over heads, from the position that CLIP pools. Attention rollout, which follows
    attention through all layers, was tried too: half of what it tells is the residual path, which is the same in all groups,
    so that it hides in what they differ. What goes to the tokens around the title and to the class token itself is left out,
    and the rest is made to sum to 1. A word has the sum over its tokens. Position t of the last layer has read all words up to
    it, so a word's share is that of its place, not of its letters alone.

    Args:
        encoder: in eval mode, on a CLIP that tells its attention.
        inputs: of one item, as its source gives them.
        end_of_text: as in `ClipPeftEncoder.attention`.
        places: each token's word, from `words_of_tokens`, [tokens].
        label: whose adapter it is.
    """
    of_image, of_title = encoder.attention(*inputs, end_of_text)
    words = patches = None
    if of_title is not None:
        in_words = places >= 0
        words = _shares(np.bincount(places[in_words], of_title[0].cpu().double().numpy()[in_words]))  # [words]
    if of_image is not None:
        side = round((of_image.shape[1] - 1) ** 0.5)
        patches = _shares(of_image[0, 1:].cpu().double().numpy().reshape(side, side))
    return View(label, words, patches)


def seen_part(path: Path, processor: BaseImageProcessor, edge: int = IMAGE_EDGE) -> np.ndarray:
    """The part of an image that CLIP sees, but sharp enough for people, uint8 [edge, edge, 3]; grey where there is none."""
    try:
        with decoded_image(path, edge) as image:
            box = None  # all of it, squeezed
            if processor.do_center_crop and "shortest_edge" in processor.size:
                share = min(1.0, processor.crop_size["height"] / processor.size["shortest_edge"])
                side = share * min(image.size)
                left, top = (image.width - side) / 2, (image.height - side) / 2
                box = (left, top, left + side, top + side)
            return np.asarray(image.resize((edge, edge), Image.Resampling.BICUBIC, box=box))
    except (OSError, ValueError):
        return np.asarray(Image.new("RGB", (edge, edge), "lightgray"))


def _labelled_adapters(folder: Path, with_groups: bool) -> list[tuple[str, Path]]:
    """What the adapters of a run are called, and the folders that they lie in."""
    adapters = [("global", folder / "global")]
    if with_groups:
        sizes = np.bincount(read_groups(folder / "groups.csv"))
        own = sorted((folder / "personalized").glob("group_*"), key=lambda path: int(path.name.removeprefix("group_")))
        sizes = np.pad(sizes, (0, len(own)))
        adapters += [(f"group {group}\n{sizes[group]:,} users", path) for group, path in enumerate(own)]
    return adapters


def _load_adapter(encoder: ClipPeftEncoder, folder: Path) -> None:
    try:
        encoder.load_group(folder, 0)
    except Exception as error:  # a damaged file raises what its format's library likes
        raise PerPEFTError(f"the adapter in {folder} cannot be read ({error})") from error


def explain_item(
    folder: Path, name: str, train_dir: str | Path = "./dataset", device: str | None = None, clip_model: str | None = None
) -> tuple[int, Explanation]:
    """How each adapter of a finished run looks at an item; nothing is written.

    Args:
        folder, train_dir, device, clip_model: as in `finished_options`.
        name: the item's raw id or number.
    Returns:
        the item's number, and how it is seen
    Raises:
        PerPEFTError: the run is not finished, has no adapters inside CLIP, its data has changed, or there is no such item.
    """
    options, expected = finished_options(folder, train_dir, device, clip_model)
    if options.peft_type not in INSIDE_CLIP:
        raise PerPEFTError(
            f"{folder} is a run of the kind '{options.peft_type}', which leaves CLIP's attention as it is in every group; "
            "attention can be shown for LoRA and IA3 runs"
        )
    dataset = finished_dataset(options, expected)
    item = item_number(dataset, name)
    title = dataset.titles[item - 1]
    foundation = load_foundation(clip_folder(options.clip_model, dataset), attention="eager")
    kind = EncoderKind(options.peft_type, options.rank, options.modality)
    encoder, source = encoder_and_source(kind, foundation, dataset, torch.device(options.device), options.missing_images)
    encoder.to(options.device).eval()
    words, views = _views(encoder, source, foundation, item, title, _labelled_adapters(folder, has_groups(options)))
    image = seen_part(dataset.image_paths[item - 1], foundation.image_processor)
    heading = f"What CLIP looks at: item {item} ({dataset.raw_ids[item - 1]})\n{folder.resolve().name}"
    return item, Explanation(heading, title, words, image, views)


def _views(
    encoder: ClipPeftEncoder, source: ItemSource, foundation: Foundation, item: int, title: str, adapters: list[tuple[str, Path]]
) -> tuple[list[str], list[View]]:
    tokenizer = foundation.tokenizer
    encoded = tokenizer(title, truncation=True, max_length=foundation.max_tokens, return_offsets_mapping=True)
    pooled = encoded["input_ids"].index(tokenizer.eos_token_id)
    offsets = [span if place < pooled else (0, 0) for place, span in enumerate(encoded["offset_mapping"])]
    words, places = words_of_tokens(title, offsets)
    inputs = source.fetch(np.array([item]), next(encoder.parameters()).device)
    views = []
    for label, where in adapters:  # one after another in the one place, since CLIP needs no more than one at a time
        _load_adapter(encoder, where)
        views.append(view_of(encoder, inputs, tokenizer.eos_token_id, places, label))
    return words, views


# ---------------------------------------------------------------- drawing


def _spotlight(image: np.ndarray, patches: np.ndarray, brightest: float) -> np.ndarray:
    """An image dark where it is not looked at, uint8 [height, width, 3]."""
    scaled = Image.fromarray(np.float32(patches / brightest)).resize(image.shape[1::-1], Image.Resampling.BICUBIC)
    light = DARKEST + (1 - DARKEST) * np.clip(np.asarray(scaled), 0, 1)
    return np.uint8(image * light[:, :, None])


def _word_boxes(words: list[str]) -> list[tuple[str, float, float, float]]:
    """Each word as it is shown, with its left edge, its top edge and its width, in lines of bounded width."""
    boxes, left, top = [], 0.0, 0.0
    for word in words:
        shown = word if len(word) <= LONGEST_WORD else word[: LONGEST_WORD - 1] + "…"
        width = max(len(shown) * LETTER + 0.12, 0.58)  # room for the figures below the word
        if left and left + width > WORDS_WIDTH:
            left, top = 0.0, top + LINE_HEIGHT
        boxes.append((shown, left, top, width))
        left += width + 0.05
    return boxes


def moved(share: np.ndarray, before: np.ndarray) -> float:
    """How much of the attention lies elsewhere than before: the total variation distance of two distributions."""
    return float(np.abs(share - before).sum() / 2)


def _told_moves(view: View, first: View) -> str:
    """How far an adapter's attention is from the first one's."""
    if view is first:
        return ""
    pairs = (("words", view.words, first.words), ("image", view.patches, first.patches))
    return "\n".join(f"{name}: {100 * moved(own, before):.0f} % moved" for name, own, before in pairs if own is not None)


def _draw_words(axes: Axes, words: list[str], view: View, first: View, most: float, x: float, y: float) -> None:
    for (shown, left, top, width), share, before in zip(_word_boxes(words), view.words, first.words):
        strength = share / most
        colour = colormaps["YlOrRd"](0.85 * strength)
        axes.add_patch(Rectangle((x + left, y + top), width, WORD_HEIGHT, color=colour, lw=0))
        look = {"family": "DejaVu Sans Mono", "ha": "center", "color": "white" if strength > 0.75 else "black"}
        write_text(axes, x + left + width / 2, y + top + 0.035, shown, NORMAL, **look)
        more = round(100 * (share - before))
        change = f" ({more:+d})" if more else ""
        write_text(axes, x + left + width / 2, y + top + WORD_HEIGHT + 0.03, f"{100 * share:.0f}{change}", SMALL, ha="center")


def draw_explanation(path: str | Path, explanation: Explanation) -> None:
    """Draw a row an adapter: its label, the image lit by attention, and the title's words shaded by attention."""
    views, words = explanation.views, explanation.words
    first, image_left, words_left = views[0], LABEL_WIDTH - 0.45, LABEL_WIDTH + EDGE - 0.25
    boxes = [] if first.words is None else _word_boxes(words)
    row_height = max(EDGE, max((top + LINE_HEIGHT for _, _, top, _ in boxes), default=0)) + GAP
    width = words_left + max(LEAST_WORDS_WIDTH, *(left + width for _, left, _, width in boxes), 0) + GAP
    top = 0.65
    bottom = top + (len(views) + 1) * row_height
    figure, axes = inch_axes(width, bottom + 0.65)
    write_text(axes, GAP, 0.12, explanation.heading, NORMAL + 1, weight="bold")
    draw_image(axes, explanation.image, image_left, top)
    write_text(axes, GAP, top, "the item", NORMAL)
    write_text(axes, words_left, top, cut_title(explanation.title, TITLE_LETTERS, TITLE_LINES), NORMAL, linespacing=1.35)
    for place, view in enumerate(views, 1):
        y = top + place * row_height
        write_text(axes, GAP, y, view.label, NORMAL, linespacing=1.35)
        write_text(axes, GAP, y + 0.45, _told_moves(view, first), SMALL, color="dimgray", linespacing=1.4)
        if view.patches is not None:
            brightest = max(other.patches.max() for other in views)
            draw_image(axes, _spotlight(explanation.image, view.patches, brightest), image_left, y)
        if view.words is not None:
            _draw_words(axes, words, view, first, max(other.words.max() for other in views), words_left, y)
    write_text(axes, GAP, bottom, FOOTNOTE, SMALL, color="dimgray", linespacing=1.4)
    save_figure(path, figure)


def told_explanation(explanation: Explanation) -> str:
    """The words' shares in percent, a line an adapter."""
    if explanation.views[0].words is None:
        return "this run reads no titles: see the image"
    width = max(len(view.label.splitlines()[0]) for view in explanation.views) + 2
    lines = []
    for view in explanation.views:
        shares = "  ".join(f"{word} {100 * share:.0f}" for word, share in zip(explanation.words, view.words))
        lines.append(f"{view.label.splitlines()[0]:<{width}}{shares}")
    return "\n".join(lines)
