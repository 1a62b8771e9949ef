"""The two towers of a dual encoder of transformers: their layers, their features and their hidden states."""
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from models.item_encoder import MODALITIES

TOWER_NAMES = {"image": ("vision_model", "image_model"), "text": ("text_model",)}  # attributes that models have them under
Layers = dict[str, tuple[str, ...]]  # names of both towers' linear layers by role

# What these layers are called in transformers, CLIP's names first; one layer for query, key and value is all three.
KNOWN_LAYERS: Layers = {
    "query": ("q_proj", "query", "q_lin", "attn.q", "qkv"),
    "key": ("k_proj", "key", "k_lin", "attn.k", "qkv"),
    "value": ("v_proj", "value", "v_lin", "attn.v", "qkv"),
    "feed_forward": ("fc1", "intermediate.dense", "ffn.lin1", "up_proj"),  # the first of each block
}
CLIP_LAYERS: Layers = {role: names[:1] for role, names in KNOWN_LAYERS.items()}


@dataclass(frozen=True)
class Traits:
    """How a dual encoder reads items, as `find_traits` finds it; the defaults are CLIP's."""

    title_token: str = "end"  # which token the text tower pools, one of those in `pooling`
    end_token: int | None = None  # the number of the token that ends a title
    class_token: bool = True  # whether the image tower pools its first token; otherwise its states are means over patches
    masks_titles: bool = False  # whether padding changes a title's features unless the text tower gets a mask
    pads_titles: bool = False  # whether padding changes them even with a mask, so that every title is padded to the longest input
    widths: tuple[tuple[str, int], ...] = ()  # of an image's and a title's features; empty for the configuration's width
    longest_title: int = 77  # the text tower's longest input, in tokens

    def pooling(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The share of each token in what the text tower pools, [items, length], of tokens and mask as in `dual_features`."""
        mask = torch.ones_like(tokens) if mask is None else mask
        if self.title_token == "mean":
            return mask / mask.sum(1, keepdim=True)
        length = tokens.shape[1]
        places = {
            "first": lambda: torch.zeros_like(tokens[:, 0]),
            "last": lambda: torch.full_like(tokens[:, 0], length - 1),  # padding included
            "final": lambda: mask.sum(1) - 1,  # the last that is no padding
            "end": lambda: (tokens == self.end_token).int().argmax(1),  # the first `end_token`
            "highest": lambda: tokens.argmax(1),  # the first of the highest number
        }[self.title_token]()  # [items]
        # not one_hot, which takes no meta tensor in torch 2.2
        return (torch.arange(length, device=tokens.device) == places.unsqueeze(1)).float()

    def pool(self, states: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """What the text tower pools of one vector a token, [items, length, width] -> [items, width]."""
        return torch.einsum("il,ilw->iw", self.pooling(tokens, mask).to(states.dtype), states)

    def feature_width(self, modality: str, config: PretrainedConfig) -> int:
        """Width of an item's features: of its image, its title, or both side by side."""
        widths = dict(self.widths) or dict.fromkeys(MODALITIES["both"], getattr(config, "projection_dim", None))
        return sum(widths[part] for part in MODALITIES[modality])


CLIP_TRAITS = Traits()


def tower_name(model: nn.Module, part: str) -> str | None:
    """The attribute that holds a model's "image" or "text" tower; None where there is none."""
    return next((name for name in TOWER_NAMES[part] if getattr(model, name, None) is not None), None)


def tower(model: nn.Module, part: str) -> nn.Module:
    """A model's "image" or "text" tower."""
    return getattr(model, tower_name(model, part))


def drop_none(**inputs: Tensor | None) -> dict[str, Tensor]:
    """Keyword arguments without those that are None."""
    return {name: tensor for name, tensor in inputs.items() if tensor is not None}


def layers_of(model: nn.Module) -> Layers:
    """Which of the known names of layers a model has."""
    linear = [f".{name}" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {
        role: tuple(name for name in names if any(at.endswith(f".{name}") for at in linear))
        for role, names in KNOWN_LAYERS.items()
    }


def part_features(model: nn.Module, part: str, **inputs: Tensor | None) -> Tensor:
    """A dual encoder's embeddings as they are, [items, width], of "image" (`pixel_values`) or "text" (`input_ids` and a mask)."""
    found = getattr(model, f"get_{part}_features")(**drop_none(**inputs))
    found = found if isinstance(found, Tensor) else found.pooler_output  # the latter in transformers 5
    return found[:, 0] if found.dim() == 3 else found  # FLAVA projects every token, and compares the first


def dual_features(model: nn.Module, images: Tensor | None, tokens: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """A dual encoder's L2-normalised embeddings of images and titles side by side or of one alone, [items, width], float32.

    Args:
        images: normalised, [items, 3, height, width].
        tokens: token ids of the titles, [items, length].
        mask: 1 at tokens, 0 at padding, [items, length], where the model needs one.
    """
    embeddings = []
    if images is not None:
        embeddings.append(part_features(model, "image", pixel_values=images))
    if tokens is not None:
        embeddings.append(part_features(model, "text", input_ids=tokens, attention_mask=mask))
    return torch.cat([F.normalize(embedding.float(), dim=-1) for embedding in embeddings], dim=-1)


def evenly_spaced(depths: list[int]) -> list[list[int]]:
    """Which hidden states are cached of towers of some depths, 0 being the embedding output: seven as in the paper, or all of a
    shallower tower, evenly spaced over each. For ViT-B/32: 0, 2, ..., 12 of both.
    """
    steps = min(6, *depths)  # S - 1 of the paper
    return [[round(depth * step / steps) for step in range(steps + 1)] for depth in depths]


@contextlib.contextmanager
def recorded_states(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that a tower's hidden states come into when it runs, in the graph of what is computed from them.

    They are what the tower returns, or, since some return none in transformers 4.57, what goes into and comes out of its layers.
    """
    found: list[Tensor] = []
    of_layers: list[Tensor] = []
    layers = max((part for part in module.modules() if isinstance(part, nn.ModuleList)), key=len, default=[])

    def ask(_: nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
        return args, inputs | {"output_hidden_states": True}

    def enter(_: nn.Module, args: tuple, inputs: dict) -> None:
        of_layers.append(args[0] if args else inputs["hidden_states"])

    def leave(_: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        of_layers.append(output if isinstance(output, Tensor) else output[0])

    hooks = [
        module.register_forward_pre_hook(ask, with_kwargs=True),
        module.register_forward_hook(lambda _, args, output: found.extend(output.hidden_states or of_layers)),
        *(layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers[:1]),
        *(layer.register_forward_hook(leave) for layer in layers),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _tower_states(model: nn.Module, part: str, **inputs: Tensor | None) -> list[Tensor]:
    """All hidden states of a tower, [items, tokens, width] each; a map [items, width, height, width] counts as its places."""
    module = tower(model, part)
    with recorded_states(module) as found:
        module(**drop_none(**inputs))
    states = [state.flatten(2).transpose(1, 2) if state.dim() == 4 else state for state in found]
    widths = sorted({state.shape[2] for state in states})
    if len(widths) > 1:
        raise ValueError(
            f"the hidden states of its {part} tower have several widths ({', '.join(map(str, widths))}), and IISAN needs one; "
            "use perpeft_lora_ia3.py, or another model"
        )
    return states


def hidden_states(
    model: nn.Module, traits: Traits, images: Tensor | None, tokens: Tensor | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The cached states of images, of titles, or of both, given as in `dual_features`, by a model in eval mode.

    Returns:
        image states (the class token, or the mean over patches where there is none) [items, S, image width],
        title states (the pooled token, or the mean) [items, S, text width]; a width of 0 for what was not there
    Raises:
        ValueError: the states of a tower have several widths.
    """
    found = {}
    if images is not None:
        found["image"] = _tower_states(model, "image", pixel_values=images)
    if tokens is not None:
        found["text"] = _tower_states(model, "text", input_ids=tokens, attention_mask=mask)

    def pool(part: str, state: Tensor) -> Tensor:
        if part == "text":
            return traits.pool(state, tokens, mask)
        return state[:, 0] if traits.class_token else state.mean(1)

    pooled = {}
    for part, layers in zip(found, evenly_spaced([len(states) - 1 for states in found.values()])):
        pooled[part] = torch.stack([pool(part, found[part][layer]) for layer in layers], dim=1).float()  # [items, S, width]
    some = next(iter(pooled.values()))
    absent = some.new_empty(*some.shape[:2], 0)
    return pooled.get("image", absent), pooled.get("text", absent)


def skeleton(config: PretrainedConfig) -> nn.Module:
    """The model of a configuration without any weights, on torch's meta device."""
    with torch.device("meta"):
        return AutoModel.from_config(config, attn_implementation="eager")  # the others ask for values of masks


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, with or without weights."""
    return sum(parameter.numel() for parameter in model.parameters())
