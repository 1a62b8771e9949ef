"""What differs between dual encoders, found by running one on an image and a few titles."""
import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from models.clip_peft import channel_statistics
from models.towers import TOWER_NAMES, Traits, dual_features, part_features, recorded_states, tower, tower_name
from utils.items.preprocessing import bare_image, output_size, processed
from utils.items.store import padding_token


def find_traits(model: nn.Module, processor: BaseImageProcessor | None, tokenizer: PreTrainedTokenizerBase) -> Traits:
    """Try a dual encoder in eval mode on an image (unless `processor` is None) and on titles.

    A title's features are the model's own of that title alone. Where they stay the same in a batch with padding, no mask is
    used; else a mask; and where that does not help either, as in SigLIP, all titles are padded to the longest input. What
    the towers pool follows from the gradients of their features.

    Raises:
        ValueError: its parts do not fit together, or it pools titles in a way that is not known here.
        Exception: the model's own, where it does not run on an image and a title alone.
    """
    for part in ("text",) if processor is None else ("image", "text"):
        if tower_name(model, part) is None:
            raise ValueError(f"it has no {part} tower called {' or '.join(TOWER_NAMES[part])}")
    widths, class_token = [], False
    if processor is not None:
        class_token, width = _image_reading(model, processor)
        widths.append(("image", width))
    longest = _longest_title(model, tokenizer)
    rows = _tried_titles(model, tokenizer, longest)
    tokens = pad_sequence(rows, batch_first=True, padding_value=padding_token(tokenizer))  # [titles, longest]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # [titles, longest]
    masks, pads = _padding_rule(model, rows, tokens, mask)
    first, last, width = _pooled_tokens(model, "text", input_ids=tokens, attention_mask=mask if masks else None)
    widths.append(("text", width))
    end = int(tokens[0, last[0].int().argmax()])
    if not first[0, : len(rows[0])].all():
        raise ValueError(
            f"its tokenizer does not fit its model: it ends a title by token {rows[0][-1]}, but the model pools token {end}; "
            f"eos_token_id is {getattr(tower(model, 'text').config, 'eos_token_id', None)} in config.json and "
            f"{tokenizer.eos_token_id} in the tokenizer, correct the one that is wrong"
        )
    for kind in ("first", "last", "end", "highest", "final", "mean"):
        traits = Traits(kind, end, class_token, masks, pads, tuple(widths), longest)
        if torch.equal(traits.pooling(tokens, None if pads else mask) > 0, last):
            if pads and kind != "last":
                raise ValueError("its features of a title change with padding, whether masked or not")
            return traits
    raise ValueError("its text tower pools neither one token of a title, the first, the last or a special one, nor their mean")


def _pooled_tokens(model: nn.Module, part: str, **inputs: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """By gradients: on which tokens of its first and last state a tower's features depend, [items, tokens] each; their width."""
    with torch.enable_grad(), recorded_states(tower(model, part)) as states:
        features = part_features(model, part, **inputs)
        weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))  # a plain sum may not change at all
        ends = [states[0], states[-1]]
        gradients = torch.autograd.grad((features * weights.to(features)).sum(), ends, allow_unused=True)
    found = [torch.ones_like(end) if gradient is None else gradient for end, gradient in zip(ends, gradients)]
    first, last = ((gradient if gradient.dim() == 3 else gradient.flatten(2).transpose(1, 2)) for gradient in found)
    return (first != 0).any(2), (last != 0).any(2), features.shape[1]


def _tried_titles(model: nn.Module, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[torch.Tensor]:
    """Token numbers of an ordinary title, which comes first, and of unusual ones, the last of which has `longest`."""
    embeddings = getattr(tower(model, "text").config, "vocab_size", None)
    highest = max(tokenizer.get_vocab().values())
    if embeddings and highest >= embeddings:
        sizes = f"its tokenizer has tokens up to number {highest}, its text tower {embeddings} token embeddings"
        raise ValueError(f"its parts do not fit together: {sizes}")
    specials = " ".join(tokenizer.all_special_tokens)
    titles = ["red lamp of wood and steel", "", "lamp", f"red {specials} lamp", "very long title " * longest]
    return [torch.tensor(row) for row in tokenizer(titles, truncation=True, max_length=longest)["input_ids"] if len(row)]


@torch.no_grad()
def _padding_rule(model: nn.Module, rows: list[torch.Tensor], tokens: torch.Tensor, mask: torch.Tensor) -> tuple[bool, bool]:
    """Whether titles need a mask to have the features in a batch that they have alone; whether not even that is enough."""

    def changed(mask: torch.Tensor | None) -> bool:
        return (dual_features(model, None, tokens, mask) - alone).abs().max().item() > 2e-5  # what other batch sizes may change

    alone = torch.cat([dual_features(model, None, row[None], torch.ones_like(row[None])) for row in rows])
    needs_mask = changed(None)
    pads = needs_mask and changed(mask)
    return needs_mask and not pads, pads


def _image_reading(model: nn.Module, processor: BaseImageProcessor) -> tuple[bool, int]:
    """Whether the image tower pools its first token alone, and the width of an image's features."""
    height, width = output_size(processor)
    drawn = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = torch.from_numpy(processed(drawn, processor))  # [3, height, width]
    scale, shift = channel_statistics(processor)
    own = torch.addcmul(shift, torch.from_numpy(bare_image(drawn, processor)).float(), scale)
    if (own - image).abs().max() > 1e-3:
        raise ValueError("its image processor does more than resize, crop, rescale and normalise")
    try:
        _, pooled, features = _pooled_tokens(model, "image", pixel_values=image[None])
    except Exception as error:
        side = getattr(tower(model, "image").config, "image_size", None)
        if side in (None, height, [height, width]):
            raise
        sizes = f"its image processor makes images of {height} x {width} pixels, its image tower takes {side} x {side}"
        raise ValueError(f"its parts do not fit together: {sizes}") from error
    return pooled.shape[1] > 1 and pooled[0].nonzero().tolist() == [[0]], features


def _longest_title(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The text tower's longest input, in tokens."""
    text = tower(model, "text")
    longest = getattr(text.config, "max_position_embeddings", None)
    if not longest:
        return min(tokenizer.model_max_length, 512)  # where neither names one
    tables = [module for name, module in text.named_modules() if name.endswith("position_embeddings")]
    reserved = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return longest - max(reserved, default=0)  # RoBERTa's family counts positions from its padding token's number on
