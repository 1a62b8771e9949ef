"""Dual encoders of transformers: what differs between their architectures, their features and their hidden states."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from models.item_encoder import MODALITIES


@dataclass(frozen=True)
class Layers:
    """Names of the linear layers in both towers: of attention, and the first of each feed-forward block."""

    query: tuple[str, ...] = ("q_proj",)
    key: tuple[str, ...] = ("k_proj",)
    value: tuple[str, ...] = ("v_proj",)
    feed_forward: tuple[str, ...] = ("fc1",)


@dataclass(frozen=True)
class Architecture:
    """One family of dual encoders.

    Attributes:
        layers: that adapters sit on.
        title_token: the token that the text tower pools: "end" (of text), "first", "last", or "mean" for the mean over all.
        has_class_token: whether the image tower pools a first token; otherwise its states are means over patches.
        pads_titles: whether every title is padded to the text tower's longest input.
        masks_titles: whether the text tower takes an attention mask.
        reserved_positions: position embeddings of the text tower that no token takes.
        any_image_size: whether the image tower takes images of other sizes than its configuration's.
    """

    layers: Layers = Layers()
    title_token: str = "end"
    has_class_token: bool = True
    pads_titles: bool = False
    masks_titles: bool = False
    reserved_positions: int = 0
    any_image_size: bool = False


_WITH_BERT = Layers(("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("fc1", "intermediate.dense"))
ARCHITECTURES = {  # by transformers' model_type
    "clip": Architecture(),
    "siglip": Architecture(title_token="last", has_class_token=False, pads_titles=True),
    "chinese_clip": Architecture(_WITH_BERT, title_token="first", masks_titles=True),
    "altclip": Architecture(_WITH_BERT, title_token="first", masks_titles=True, reserved_positions=2),
}


def architecture(config: PretrainedConfig) -> Architecture:
    """The family of a model by its configuration; a pair of encoders has its own."""
    return getattr(config, "architecture", None) or ARCHITECTURES[config.model_type]


def feature_width(config: PretrainedConfig, modality: str = "both") -> int:
    """Width of an item's features: of its image, its title, or both side by side."""
    towers = {"image": config.vision_config, "text": config.text_config}
    common = getattr(config, "projection_dim", None)
    return sum(common or towers[part].hidden_size for part in MODALITIES[modality])


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the models by that configuration."""
    with torch.device("meta"):  # counts them without making them
        models = [AutoModel.from_config(part) for part in getattr(config, "parts", [config])]
        return sum(parameter.numel() for model in models for parameter in model.parameters())


def pooled_places(config: PretrainedConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Where the token lies that the text tower pools, if it is one, [items, length] -> [items]."""
    where = architecture(config).title_token
    if where == "end":
        end = config.text_config.eos_token_id
        # transformers takes an end-of-text id of 2, which older configurations have by mistake, for "the largest id"
        return tokens.argmax(-1) if end == 2 else (tokens == end).int().argmax(-1)
    return torch.full_like(tokens[:, 0], 0 if where == "first" else tokens.shape[1] - 1)


def pool_states(
    config: PretrainedConfig, states: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """What the text tower pools of one vector a token: the pooled token's, or the mean over a title's tokens.

    Args:
        config: of the model.
        states: [items, length, width].
        tokens, mask: as in `dual_features`.
    Returns:
        [items, width]
    """
    if architecture(config).title_token != "mean":
        return states[torch.arange(len(tokens), device=tokens.device), pooled_places(config, tokens)]
    weights = mask.unsqueeze(-1).to(states.dtype)  # [items, length, 1]
    return (states * weights).sum(1) / weights.sum(1)


def dual_features(
    model: PreTrainedModel, images: torch.Tensor | None, tokens: torch.Tensor | None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """A dual encoder's L2-normalised embeddings of images and titles side by side, or of one of them alone.

    Args:
        model: of a family in ARCHITECTURES, with or without adapters.
        images: normalised, [items, 3, height, width].
        tokens: token ids of the titles, [items, length].
        mask: 1 at tokens, 0 at padding, [items, length], where the family takes one.
    Returns:
        [items, feature_width] of both or of one alone; float32
    """
    features = []
    if images is not None:
        features.append(model.get_image_features(pixel_values=images))
    if tokens is not None:
        # Without a mask, CLIP is causal and pools the end-of-text token, so what follows it cannot matter.
        masked = {} if mask is None else {"attention_mask": mask}
        features.append(model.get_text_features(input_ids=tokens, **masked))
    # transformers 5 returns outputs whose pooler_output holds the embeddings
    embeddings = [found if isinstance(found, torch.Tensor) else found.pooler_output for found in features]
    return torch.cat([F.normalize(embedding.float(), dim=-1) for embedding in embeddings], dim=-1)


MAX_STATES = 7  # S of the paper: every second layer of ViT-B/32's twelve, and the embedding output


def cached_layers(config: PretrainedConfig) -> tuple[list[int], list[int]]:
    """Which hidden states are cached, 0 being the embedding output: seven as in the paper, or all of a shallower tower, evenly
    spaced over both towers. For ViT-B/32: 0, 2, ..., 12 of both.

    Returns:
        layers of the image tower, layers of the text tower, S each.
    """
    text_depth = config.text_config.num_hidden_layers
    image_depth = config.vision_config.num_hidden_layers if config.vision_config else text_depth
    steps = min(MAX_STATES - 1, image_depth, text_depth)
    return tuple([round(depth * step / steps) for step in range(steps + 1)] for depth in (image_depth, text_depth))


def state_shapes(config: PretrainedConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """[S, width] of an item's image states and of its title states."""
    image_layers, text_layers = cached_layers(config)
    image_width = config.vision_config.hidden_size if config.vision_config else 0
    return (len(image_layers), image_width), (len(text_layers), config.text_config.hidden_size)


@torch.no_grad()
def hidden_states(
    model: PreTrainedModel, images: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cached states of some items.

    Args:
        model: in eval mode.
        images, tokens, mask: as in `dual_features`.
    Returns:
        image states (the class token, or the mean over patches where there is none) [items, S, image width],
        title states (the pooled token, or the mean) [items, S, text width]
    """
    image_layers, text_layers = cached_layers(model.config)
    image_states = [tokens.new_empty(len(tokens), 0) for _ in image_layers]  # of a text encoder alone
    if model.config.vision_config:
        image = model.vision_model(pixel_values=images, output_hidden_states=True).hidden_states
        has_class_token = architecture(model.config).has_class_token
        image_states = [image[layer][:, 0] if has_class_token else image[layer].mean(1) for layer in image_layers]
    masked = {} if mask is None else {"attention_mask": mask}
    title = model.text_model(input_ids=tokens, output_hidden_states=True, **masked).hidden_states
    text_states = [pool_states(model.config, title[layer], tokens, mask) for layer in text_layers]
    return torch.stack(image_states, dim=1).float(), torch.stack(text_states, dim=1).float()
