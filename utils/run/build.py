"""The one place that knows the kinds of adapters: builds the model, and the source of its item inputs."""
import argparse
import dataclasses
from typing import Any

import torch

from models import (
    IISAN,
    ClipPeftEncoder,
    FrozenEncoder,
    IISANEncoder,
    ItemEncoder,
    MMProjector,
    NoProjector,
    PerPEFT,
    SASRec,
)
from models.peft_configs import peft_config
from models.towers import count_parameters, layers_of
from utils.common.devices import PRECISIONS
from utils.common.errors import PerPEFTError
from utils.data.dataset import Dataset
from utils.items.foundation import Foundation, ensure_hidden_states, known_model, load_foundation
from utils.items.hidden_states import HiddenStateStore, has_states
from utils.items.model_files import FoundationName, PairName
from utils.items.source import FeatureStore, ItemSource
from utils.prepare.demo_clip import demo_clip

MODEL_OPTIONS = ("clip_model", "image_model", "text_model")  # that name folders, which may move


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


def has_groups(options: argparse.Namespace) -> bool:
    """Whether a run has groups: the methods that PerPEFT is compared with have none."""
    return options.method == "perpeft"


def needs_contents(options: argparse.Namespace) -> bool:
    """Whether images, titles and the model's weights are needed: not by IISAN once the hidden states are there."""
    if options.peft_type == "iisan":
        return not has_states(options.train_dir, options.dataset, options.modality)
    return options.peft_type != "none"


def image_use(options: argparse.Namespace) -> str:
    """What to do without an image: --missing_images, or "unused" where titles alone are read."""
    return "unused" if options.modality == "text" else options.missing_images


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
            ensure_hidden_states(dataset, clip_model, device, missing_images, kind.modality)
    if kind.peft_type == "iisan":
        skeleton = known_model(clip_model)
        store = HiddenStateStore.open(dataset, clip_model, skeleton, kind.modality)
        return _iisan_encoder(store, count_parameters(skeleton) if skeleton else None, kind.modality)
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
        missing_images: "error" or "blank", as in `ImageTitleStore.open`, or "unused".
    Raises:
        PerPEFTError: this kind of adapter does not go with this model.
    """
    clip, store = foundation.clip, foundation.store(dataset, missing_images)
    if kind.peft_type == "iisan":
        states = HiddenStateStore(*foundation.hidden_states(store, device, kind.modality))
        return _iisan_encoder(states, count_parameters(clip), kind.modality)
    if kind.peft_type == "frozen":
        features = foundation.features(store, device, kind.modality)
        return FrozenEncoder(features.shape[1], count_parameters(clip)), FeatureStore(features)
    try:
        encoder = ClipPeftEncoder(
            clip,
            peft_config(kind.peft_type, kind.rank, kind.peft_config, layers_of(clip)),
            foundation.image_processor,
            kind.gradient_checkpointing,
            kind.modality,
            PRECISIONS.get(kind.precision),
            foundation.traits,
        )
    except ValueError as error:  # peft's own words say which sizes do not go together
        reason = " ".join(str(error).split())
        raise PerPEFTError(f"--peft_type {kind.peft_type}: {reason}; pass other settings by --peft_config FILE") from error
    if encoder.bare:
        print(f"note: the {encoder.bare[0]} encoder has none of the layers that this adapter sits on; only the other is adapted")
    return encoder, store


def _iisan_encoder(store: HiddenStateStore, size: int | None, modality: str) -> tuple[ItemEncoder, ItemSource]:
    _, num_states, image_dim = store.image_states.shape
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


def build_model(options: argparse.Namespace, dataset: Dataset) -> tuple[PerPEFT, ItemSource]:
    """The model with one group, on its device, and the source of its item inputs."""
    device = torch.device(options.device)
    torch.manual_seed(options.trial)
    encoder, source = build_encoder(EncoderKind.of(options), dataset, foundation_name(options), device, image_use(options))
    projector = (MMProjector if encoder.feature_dim else NoProjector)(encoder.feature_dim, options.hidden_units)
    sizes = [getattr(options, name) for name in ("hidden_units", "maxlen", "num_blocks", "num_heads", "dropout_rate")]
    sasrec = SASRec(dataset.num_items, *sizes, options.weight_scalar)
    model = PerPEFT(encoder, projector, sasrec).to(device)
    source.place_on(device)
    print(
        f"{options.dataset}: {dataset.num_users} users, {dataset.num_items} items, {len(dataset.histories.items)} interactions; "
        f"{_describe_adapter(options.peft_type, encoder)}; on {device}",
        flush=True,
    )
    return model, source


def _describe_adapter(peft_type: str, encoder: ItemEncoder) -> str:
    counts = trainable_counts(encoder)
    if not counts["adapter_of_one_group"]:
        return {"frozen": "foundation model frozen, no adapter", "none": "item embeddings only"}[peft_type]
    share = counts["adapter_share_of_foundation_model"]
    share_text = "" if share is None else f", {100 * share:.2f}% of the foundation model"
    return f"{peft_type} adapter of {counts['adapter_of_one_group']:,} parameters a group{share_text}"
