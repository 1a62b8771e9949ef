"""Where CLIP attends in an item under each group's adapter: the words of its title and the patches of its image."""
import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from models import ClipPeftEncoder
from models.peft_configs import PEFT_TYPES
from utils.common.errors import PerPEFTError
from utils.data.dataset import Dataset
from utils.items.foundation import Foundation, load_foundation
from utils.run.build import foundation_name, has_groups, image_use, peft_encoder, resolve_foundation
from utils.run.reports import read_groups
from utils.training.checkpoints import load_adapter


class View(NamedTuple):
    """Attention to one item under one adapter: shares of the attention to all words and to all patches."""

    label: str  # whose adapter
    words: np.ndarray | None  # [words]; None where no title is read
    patches: np.ndarray | None  # [rows, columns]; None where no image is read

    def moved_from(self, other: "View") -> str:
        """The total variation distance to another view, the share of the attention that lies elsewhere, in words."""
        if self is other:
            return ""
        pairs = (("words", self.words, other.words), ("image", self.patches, other.patches))
        return ", ".join(
            f"{name} {100 * np.abs(own - theirs).sum() / 2:.0f} % moved" for name, own, theirs in pairs if own is not None
        )

    @property
    def strongest_patch(self) -> str:
        """Where in the image the attention is highest, in words."""
        row, column = np.unravel_index(self.patches.argmax(), self.patches.shape)
        return f"row {row + 1}, column {column + 1} of {len(self.patches)} × {len(self.patches)} patches"


class Explanation(NamedTuple):
    """Attention to one item under the global and every group's adapter."""

    item: int
    words: list[str]  # of the title, as far as CLIP reads it
    note: str  # why no words are shown, where CLIP reads titles but none of this one; else empty
    crop: float | None  # the central part of the image's shortest edge that CLIP sees, a share; None where it is squeezed whole
    views: list[View]  # the global adapter's first

    def highest(self, part: str) -> float:
        """The highest share of any view's "words" or "patches", to bring them to one scale."""
        shares = [getattr(view, part) for view in self.views]
        return max((float(each.max()) for each in shares if each is not None), default=0)


def words_of_tokens(title: str, offsets: list[tuple[int, int]]) -> tuple[list[str], np.ndarray]:
    """Split a title at white space and find which word each token is part of.

    Args:
        offsets: where each token begins and ends in the title; an empty span for tokens without letters.
    Returns:
        the words as far as there are tokens, and each token's word, -1 for none, [tokens]
    """
    begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    starts = [match.start() for match in re.finditer(r"\S+", title)]
    places = np.where(ends > begins, np.searchsorted(starts, begins, side="right") - 1, -1)
    return title.split()[: places.max(initial=-1) + 1], places


def _words_read(foundation: Foundation, title: str) -> tuple[list[str], np.ndarray]:
    """`words_of_tokens` of a title as far as the model reads it."""
    traits = foundation.traits
    encoded = foundation.tokenizer(title, truncation=True, max_length=traits.longest_title, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    if traits.title_token in ("end", "highest"):  # what follows it is never read
        pooled = int(traits.pooling(torch.tensor([encoded["input_ids"]]), None).argmax())
        offsets = [span if place < pooled else (0, 0) for place, span in enumerate(offsets)]
    return words_of_tokens(title, offsets)


@torch.no_grad()
def _view(encoder: ClipPeftEncoder, inputs: tuple[torch.Tensor, ...], places: np.ndarray, label: str) -> View:
    """Attention to one item under an encoder's present adapter.

    It is the last layer's attention, the mean over heads, from the position that CLIP pools. Attention rollout, which follows
    attention through all layers, was tried too: half of it is the residual path, which is the same in all groups and hides
    their differences. What goes to the tokens around the title and to the class token itself is left out, and the rest is made
    to sum to 1. A word has the sum over its tokens. Position t of the last layer has read all words up to it, so a word's share
    is that of its place, not of its letters alone.
    """
    of_image, of_title = encoder.attention(*inputs)
    words = patches = None
    in_words = places >= 0
    if of_title is not None and in_words.any():
        words = np.bincount(places[in_words], of_title[0, : len(places)].cpu().double().numpy()[in_words])  # [words]
        words /= words.sum()
    if of_image is not None:
        side = int((of_image.shape[1] - 1) ** 0.5)  # some models have register tokens between class token and patches
        patches = of_image[0, -side * side :].cpu().double().numpy().reshape(side, side)
        patches = patches / patches.sum()
    return View(label, words, patches)


def _central_crop(processor: BaseImageProcessor) -> float | None:
    """The share of an image's shortest edge that CLIP sees, a central square; None where it sees all, squeezed to a square."""
    if getattr(processor, "do_center_crop", False) and "shortest_edge" in processor.size:
        return min(1.0, processor.crop_size["height"] / processor.size["shortest_edge"])
    return None


def _adapter_folders(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """The folders of a run's adapters by label."""
    adapters = {"global": folder / "global"}
    if has_groups(options):
        sizes = np.bincount(read_groups(folder / "groups.csv"), minlength=options.C)[: options.C]
        own = folder / "personalized"
        adapters |= {f"group {group} ({size:,} users)": own / f"group_{group}" for group, size in enumerate(sizes)}
    return adapters


def require_attention(options: argparse.Namespace, folder: Path) -> None:
    """Raise a PerPEFTError for a run whose adapters do not change CLIP's attention."""
    if options.peft_type not in PEFT_TYPES:
        raise PerPEFTError(
            f"{folder} is a run with --peft_type {options.peft_type}, which leaves CLIP's attention as it is in every group; "
            "attention can be shown for runs of perpeft_lora_ia3.py"
        )


def explain_items(options: argparse.Namespace, dataset: Dataset, folder: Path, items: Sequence[int]) -> list[Explanation]:
    """Attention to some items, by number, under each adapter of a finished run whose adapters are peft's.

    Args:
        options, dataset: from `finished_options` and `finished_dataset`.
    Raises:
        PerPEFTError: an adapter cannot be read, or the model returns no attention.
    """
    name = foundation_name(options)
    foundation = load_foundation(resolve_foundation(name, dataset), attention="eager")
    cannot = f"attention cannot be shown for '{name}': "
    if options.modality == "image" and not foundation.traits.class_token:
        raise PerPEFTError(f"{cannot}its image tower has no class token whose attention it pools")
    if not foundation.tokenizer.is_fast:
        raise PerPEFTError(f"{cannot}its tokenizer does not say where tokens lie in a title")
    source = foundation.store(dataset, image_use(options))
    encoder = peft_encoder(options, foundation).to(options.device).eval()
    titles = [_words_read(foundation, dataset.titles[item - 1]) for item in items]
    views: list[list[View]] = [[] for _ in items]
    # One adapter after another in the place of the first, since CLIP needs no more than one at a time.
    for label, where in tqdm(_adapter_folders(options, folder).items(), "attention", unit="adapter", disable=None):
        try:
            load_adapter(encoder, where, 0)
        except Exception as error:  # a damaged file raises errors of its format's library
            raise PerPEFTError(f"the adapter in {where} cannot be read ({error})") from error
        for item, own, (_, places) in zip(items, views, titles):
            inputs = source.fetch(np.array([item]), torch.device(options.device))
            try:
                own.append(_view(encoder, inputs, places, label))
            except ValueError as error:
                raise PerPEFTError(f"{cannot}{error}") from error
    unread = "" if options.modality == "image" else "CLIP reads no word of this title, which begins with its end-of-text token."
    crop = _central_crop(foundation.image_processor)
    return [Explanation(item, own, "" if own else unread, crop, seen) for item, (own, _), seen in zip(items, titles, views)]


def as_text(explanation: Explanation) -> str:
    """The words' shares in percent, one line an adapter."""
    if explanation.views[0].words is None:
        return explanation.note or "this run reads no titles: see the image"
    width = max(len(view.label) for view in explanation.views) + 2
    lines = []
    for view in explanation.views:
        shares = "  ".join(f"{word} {100 * share:.0f}" for word, share in zip(explanation.words, view.words))
        lines.append(f"{view.label:<{width}}{shares}")
    return "\n".join(lines)
