"""The one place that knows the kinds of adapters: builds an item encoder and the item source it reads from."""
import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from models import IISAN, ClipPeftEncoder, FrozenEncoder, IISANEncoder, ItemEncoder
from models.peft_configs import peft_config
from models.towers import architecture, count_parameters
from utils.common.devices import PRECISIONS
from utils.common.errors import PerPEFTError
from utils.data.dataset import Dataset
from utils.items.foundation import Foundation, ensure_hidden_states, known_config, load_foundation
from utils.items.frozen_features import FeatureStore, compute_features
from utils.items.hidden_states import HiddenStateStore, states_path
from utils.items.model_name import FoundationName, PairName
from utils.items.source import ItemSource
from utils.prepare.demo_clip import demo_clip


@dataclasses.dataclass(frozen=True)
class EncoderKind:
    """Which item encoder to build.

    Attributes:
        peft_type: one of `models.peft_configs.PEFT_TYPES`, or iisan; or, for comparison, frozen (CLIP's features as they are)
            or none (no features at all).
        rank: LoRA's and DoRA's rank.
        modality: "both", "image" or "text".
        gradient_checkpointing: as in `ClipPeftEncoder`; the others have no use for it.
        precision: of the foundation model with adapters inside it, a name in PRECISIONS.
        peft_config: settings of the adapter instead of the default ones, as in peft's adapter_config.json.
    """

    peft_type: str
    rank: int | None = 4
    modality: str = "both"
    gradient_checkpointing: bool = False
    precision: str = "fp32"
    peft_config: dict[str, Any] | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> "EncoderKind":
        """The kind that a run's options name."""
        return cls(**{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)})


def needs_contents(peft_type: str, train_dir: str | Path, name: str) -> bool:
    """Whether images, titles and CLIP's weights are needed: not by IISAN once the hidden states are there."""
    return peft_type != "none" and (peft_type != "iisan" or not states_path(train_dir, name).is_file())


def foundation_name(options: argparse.Namespace) -> FoundationName | None:
    """The foundation model that a run's options name; None where none is used."""
    if options.text_model:
        return PairName(options.image_model, options.text_model, options.text_pooling)
    return options.clip_model


def clip_folder(clip_model: FoundationName, dataset: Dataset) -> FoundationName:
    """The name of a foundation model; "demo" is the demo's own, which is trained on first use."""
    return str(demo_clip(dataset.folder)) if clip_model == "demo" else clip_model


def build_encoder(
    kind: EncoderKind, dataset: Dataset, clip_model: FoundationName | None, device: torch.device, missing_images: str = "error"
) -> tuple[ItemEncoder, ItemSource]:
    """An item encoder and the source of its inputs; IISAN's hidden states are kept on disk.

    Args:
        clip_model: as in `load_foundation`, or "demo" for the demo's own; not read where no features are used.
        kind, dataset, device, missing_images: as in `encoder_and_source`.
    """
    if kind.peft_type == "none":
        return FrozenEncoder(0), FeatureStore(torch.empty(dataset.num_items, 0))
    with torch.random.fork_rng(devices=[]):  # what is made on first use alone must not shift the draws of weights
        clip_model = clip_folder(clip_model, dataset)
        if kind.peft_type == "iisan":
            ensure_hidden_states(dataset, clip_model, device, missing_images)
    if kind.peft_type == "iisan":
        config = known_config(clip_model)
        store = HiddenStateStore.open(dataset, config, clip_model)
        return _iisan_encoder(store, config, kind.modality)
    return encoder_and_source(kind, load_foundation(clip_model), dataset, device, missing_images)


def encoder_and_source(
    kind: EncoderKind, foundation: Foundation, dataset: Dataset, device: torch.device, missing_images: str = "error"
) -> tuple[ItemEncoder, ItemSource]:
    """An item encoder on a CLIP that is loaded already, and the source of its inputs.

    Args:
        kind: which.
        foundation: the CLIP.
        dataset: whose items are encoded.
        device: where hidden states or frozen features are computed; they are not kept.
        missing_images: "error" or "blank", as in `ImageTitleStore.open`.
    Raises:
        PerPEFTError: this kind of adapter does not go with this model.
    """
    clip, store = foundation.clip, foundation.store(dataset, missing_images)
    if kind.peft_type == "iisan":
        return _iisan_encoder(HiddenStateStore(*foundation.hidden_states(store, device)), clip.config, kind.modality)
    if kind.peft_type == "frozen":
        features = compute_features(clip, foundation.image_processor, store, kind.modality, device)
        size = sum(parameter.numel() for parameter in clip.parameters())
        return FrozenEncoder(features.shape[1], size), FeatureStore(features)
    try:
        config = peft_config(kind.peft_type, kind.rank, kind.peft_config, architecture(clip.config).layers)
        encoder = ClipPeftEncoder(
            clip, config, foundation.image_processor, kind.gradient_checkpointing, kind.modality, PRECISIONS.get(kind.precision)
        )
    except ValueError as error:  # peft's own words say which sizes do not go together
        reason = " ".join(str(error).split())
        raise PerPEFTError(f"--peft_type {kind.peft_type}: {reason}; pass other settings by --peft_config FILE") from error
    return encoder, store


def _iisan_encoder(store: HiddenStateStore, config: PretrainedConfig | None, modality: str) -> tuple[ItemEncoder, ItemSource]:
    _, num_states, image_dim = store.image_states.shape
    size = count_parameters(config) if config else None
    return IISANEncoder(IISAN(image_dim, store.text_states.shape[2], num_states, modality=modality), size), store


def trainable_counts(encoder: ItemEncoder) -> dict[str, float]:
    """Parameters of one group's adapter, of all, and one's share of the foundation model (None where its size is unknown)."""
    one = sum(parameter.numel() for parameter in encoder.group_parameters(0).values())
    return {
        "adapter_of_one_group": one,
        "adapters": one * encoder.num_groups,
        "foundation_model": encoder.foundation_parameters,
        "adapter_share_of_foundation_model": one / encoder.foundation_parameters if encoder.foundation_parameters else None,
    }
