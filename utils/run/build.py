"""The place that builds each kind of adapter: the model, and the source of its item inputs."""
import argparse

import torch

from models import IISAN, ClipPeftEncoder, FrozenEncoder, IISANEncoder, ItemEncoder, MMProjector, NoProjector, PerPEFT, SASRec
from models.peft_configs import peft_config
from models.towers import count_parameters, layers_of
from utils.common.devices import PRECISIONS
from utils.common.errors import PerPEFTError
from utils.data.dataset import Dataset
from utils.items.foundation import Foundation, ensure_hidden_states, load_foundation
from utils.items.hidden_states import HiddenStateStore, has_states
from utils.items.model_files import FoundationName, PairName, known_model
from utils.items.source import FeatureStore, ItemSource
from utils.prepare.demo_clip import demo_clip

MODEL_OPTIONS = ("clip_model", "image_model", "text_model")  # that name folders, which may move


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


def resolve_foundation(name: FoundationName, dataset: Dataset) -> FoundationName:
    """The foundation model to load: as named, or for "demo" the folder of the demo's own, which is trained on first use."""
    return str(demo_clip(dataset.folder)) if name == "demo" else name


def build_encoder(options: argparse.Namespace, dataset: Dataset) -> tuple[ItemEncoder, ItemSource]:
    """The item encoder that a run's options name, and the source of its inputs; IISAN's hidden states are kept on disk.

    Raises a PerPEFTError if the foundation model cannot be loaded, or this kind of adapter does not go with it.
    """
    if options.peft_type == "none":
        return FrozenEncoder(0), FeatureStore(torch.empty(dataset.num_items, 0))
    device, images, modality = torch.device(options.device), image_use(options), options.modality
    with torch.random.fork_rng(devices=[]):  # what is made on first use alone must not shift the draws of weights
        name = resolve_foundation(foundation_name(options), dataset)
        if options.peft_type == "iisan":
            ensure_hidden_states(dataset, name, device, images, modality)
    if options.peft_type == "iisan":
        skeleton = known_model(name)
        states = HiddenStateStore.open(dataset, name, modality)
        return iisan_encoder(states, count_parameters(skeleton) if skeleton else None, modality), states
    foundation = load_foundation(name)
    store = foundation.store(dataset, images)
    if options.peft_type == "frozen":
        features = foundation.features(store, device, modality)
        return FrozenEncoder(features.shape[1], count_parameters(foundation.clip)), FeatureStore(features)
    return peft_encoder(options, foundation, options.gradient_checkpointing, PRECISIONS.get(options.precision)), store


def peft_encoder(
    options: argparse.Namespace, foundation: Foundation, gradient_checkpointing: bool = False,
    autocast_dtype: torch.dtype | None = None,
) -> ClipPeftEncoder:  # fmt: skip
    """A foundation model with adapters put inside it, by the options peft_type, rank, peft_config and modality.

    The rest is `ClipPeftEncoder`'s. Raises a PerPEFTError if this kind of adapter does not go with this model.
    """
    try:
        config = peft_config(options.peft_type, options.rank, options.peft_config, layers_of(foundation.clip))
        traits, processor, modality = foundation.traits, foundation.image_processor, options.modality
        encoder = ClipPeftEncoder(foundation.clip, config, processor, gradient_checkpointing, modality, autocast_dtype, traits)
    except ValueError as error:  # peft's own words say which sizes do not go together
        reason = " ".join(str(error).split())
        raise PerPEFTError(f"--peft_type {options.peft_type}: {reason}; pass other settings by --peft_config FILE") from error
    for part in encoder.unadapted:
        print(f"note: the {part} encoder has none of the layers that this adapter sits on; only the other is adapted")
    return encoder


def iisan_encoder(states: HiddenStateStore, foundation_parameters: int | None, modality: str = "both") -> IISANEncoder:
    """IISAN on hidden states of a foundation model of so many parameters, None where that is not known."""
    (_, num_states, image_dim), (_, _, text_dim) = (tensor.shape for tensor in states.tensors)
    return IISANEncoder(IISAN(image_dim, text_dim, num_states, modality=modality), foundation_parameters)


def trainable_counts(encoder: ItemEncoder) -> dict[str, float]:
    """Parameters of one group's adapter, of all, and one's share of the foundation model (None where its size is unknown)."""
    one, whole = sum(parameter.numel() for parameter in encoder.group_parameters(0).values()), encoder.foundation_parameters
    counts = {"adapter_of_one_group": one, "adapters": one * encoder.num_groups, "foundation_model": whole}
    return {**counts, "adapter_share_of_foundation_model": one / whole if whole else None}


def build_model(options: argparse.Namespace, dataset: Dataset) -> tuple[PerPEFT, ItemSource]:
    """The model with one group, on its device, and the source of its item inputs."""
    device = torch.device(options.device)
    torch.manual_seed(options.trial)
    encoder, source = build_encoder(options, dataset)
    projector = (MMProjector if encoder.feature_dim else NoProjector)(encoder.feature_dim, options.hidden_units)
    sizes = [getattr(options, name) for name in ("hidden_units", "maxlen", "num_blocks", "num_heads", "dropout_rate")]
    sasrec = SASRec(dataset.num_items, *sizes, options.weight_scalar)
    model = PerPEFT(encoder, projector, sasrec).to(device)
    source.place_on(device)
    trained = {"frozen": "foundation model frozen, no adapter", "none": "item embeddings only"}.get(options.peft_type)
    if trained is None:
        counts = trainable_counts(encoder)
        share = counts["adapter_share_of_foundation_model"]
        of_whole = f", {100 * share:.2f}% of the foundation model" if share else ""
        trained = f"{options.peft_type} adapter of {counts['adapter_of_one_group']:,} parameters per group{of_whole}"
    read = f"{dataset.num_users} users, {dataset.num_items} items, {len(dataset.histories.items)} interactions"
    print(f"{options.dataset}: {read}; {trained}; on {device}", flush=True)
    return model, source
