"""The one place that knows the kinds of adapters: builds an item encoder and the item source it reads from."""
import contextlib
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel
from transformers.utils import logging as transformers_logging

from models import IISAN, ClipPeftEncoder, FrozenEncoder, IISANEncoder, ItemEncoder
from models.clip_peft import ia3_config, lora_config
from utils.common.errors import PerPEFTError
from utils.common.files import add_model_files, build_once
from utils.data.dataset import Dataset
from utils.items.frozen_features import FeatureStore, compute_features
from utils.items.hidden_states import HiddenStateStore, compute_hidden_states, save_hidden_states, states_path
from utils.items.source import ItemSource
from utils.items.store import ImageTitleStore, image_status
from utils.prepare.small_clip import demo_clip, train_tokenizer

DEFAULT_CLIP = "openai/clip-vit-base-patch32"
INSIDE_CLIP = ("lora", "ia3")  # the kinds of adapter that change what CLIP's own layers do


@dataclass
class Foundation:
    """A CLIP with the processors that prepare its inputs."""

    clip: CLIPModel
    image_processor: object
    tokenizer: object

    @property
    def max_tokens(self) -> int:
        """The text tower's longest input."""
        return self.clip.config.text_config.max_position_embeddings

    def store(self, dataset: Dataset, missing_images: str = "error") -> ImageTitleStore:
        """A data set's images and titles as this CLIP reads them."""
        return ImageTitleStore.open(dataset, self.image_processor, self.tokenizer, self.max_tokens, missing_images)

    def hidden_states(self, store: ImageTitleStore, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All items' states for IISAN, as in `compute_hidden_states`."""
        return compute_hidden_states(self.clip, self.image_processor, self.tokenizer, store, device)


@contextlib.contextmanager
def _quiet_transformers():
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def load_foundation(clip_model: str, attention: str | None = None) -> Foundation:
    """Load a CLIPModel and its processors from a folder or the model hub.

    Args:
        clip_model: a folder as `save_pretrained` writes it, or a name on the hub.
        attention: transformers' name of how attention is computed; "eager" for the one that tells its weights (default: the
            library's choice, the fastest).
    Raises:
        PerPEFTError: it is neither, or not a CLIP.
    """
    is_folder = Path(clip_model).is_dir()
    try:
        with _quiet_transformers():
            # No code from a model's folder is ever run, nor is it asked whether it should be.
            source = {"local_files_only": is_folder, "trust_remote_code": False}
            kind = AutoConfig.from_pretrained(clip_model, **source).model_type
            if kind != "clip":
                raise PerPEFTError(
                    f"'{clip_model}' is a model of the kind '{kind}', which does not fit: --clip_model takes a CLIPModel of any "
                    f"size, as {DEFAULT_CLIP}, openai/clip-vit-large-patch14 or laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
                )
            clip, loading = CLIPModel.from_pretrained(
                clip_model, local_files_only=is_folder, output_loading_info=True, attn_implementation=attention
            )
            absent = [*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])]
            if absent:  # the library would go on with random weights
                raise ValueError(f"its weights lack {', '.join(absent[:3])}")
            image_processor = AutoImageProcessor.from_pretrained(clip_model, use_fast=False, **source)
            tokenizer = AutoTokenizer.from_pretrained(clip_model, **source)
    except PerPEFTError:
        raise
    except Exception as error:  # the hub's client raises its own kinds for every trouble there can be
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = "the folder is no complete CLIPModel folder" if is_folder else "there is no such folder and the hub gave none"
        raise PerPEFTError(
            f"CLIP weights '{clip_model}' cannot be loaded: {what} ({reason}). Run once with network access so that they are "
            "downloaded, or name a CLIPModel folder by --clip_model DIR, or train a small one on your data with "
            "python3 -m scripts.make_small_clip --dataset NAME and pass its folder."
        ) from error
    return Foundation(clip, image_processor, tokenizer)


def random_foundation(dataset: Dataset) -> Foundation:
    """CLIP ViT-B/32 with random weights, and a tokenizer trained on the data set's titles: for sizes and speed."""
    tokenizer = train_tokenizer(dataset.titles, max_tokens=77)
    config = CLIPConfig()
    config.text_config.eos_token_id = tokenizer.eos_token_id
    return Foundation(CLIPModel(config).eval(), CLIPImageProcessor(), tokenizer)


def known_config(clip_model: str) -> CLIPConfig | None:
    """The configuration of a CLIP without its weights, from a folder or what the hub's client has kept; else None."""
    with _quiet_transformers(), contextlib.suppress(Exception):
        return CLIPConfig.from_pretrained(clip_model, local_files_only=True)
    return CLIPConfig() if clip_model == DEFAULT_CLIP else None  # the library's defaults are ViT-B/32


@dataclass(frozen=True)
class EncoderKind:
    """Which item encoder is wanted.

    Attributes:
        peft_type: lora, ia3 or iisan; or, for comparison, frozen (CLIP's features as they are) or none (no features at all).
        rank: LoRA's rank.
        modality: "both", "image" or "text": what of an item is looked at.
        gradient_checkpointing: as in `ClipPeftEncoder`; the others have nothing to spare.
    """

    peft_type: str
    rank: int | None = 4
    modality: str = "both"
    gradient_checkpointing: bool = False


def needs_contents(peft_type: str, train_dir: str | Path, name: str) -> bool:
    """Whether images, titles and CLIP's weights are needed: not by IISAN once the hidden states are there."""
    return peft_type != "none" and (peft_type != "iisan" or not states_path(train_dir, name).is_file())


def contents_fingerprint(peft_type: str, dataset: Dataset, clip_model: str | None) -> str | None:
    """A hash of what the encoder reads beside the histories: titles, sizes of images, and the files of a CLIP folder.

    None for IISAN, whose hidden states are checked when they are opened, and where nothing is read. A CLIP from the hub (or
    None) adds nothing.
    """
    if peft_type in ("iisan", "none"):
        return None
    digest = hashlib.sha256()
    for title, path in zip(dataset.titles, dataset.image_paths):
        status = image_status(path)
        digest.update(f"{title}\0{status.st_size if status else None}\n".encode())
    if clip_model and Path(clip_model).is_dir():
        add_model_files(digest, clip_model)
    return digest.hexdigest()[:16]


def encoder_and_source(
    kind: EncoderKind, foundation: Foundation, dataset: Dataset, device: torch.device, missing_images: str = "error"
) -> tuple[ItemEncoder, ItemSource]:
    """An item encoder on a CLIP that is at hand, and the source of its inputs.

    Args:
        kind: which.
        foundation: the CLIP.
        dataset: whose items are encoded.
        device: where hidden states or frozen features are computed; they are not kept.
        missing_images: "error" or "blank", as in `ImageTitleStore.open`.
    """
    clip, store = foundation.clip, foundation.store(dataset, missing_images)
    if kind.peft_type == "iisan":
        return _iisan_encoder(HiddenStateStore(*foundation.hidden_states(store, device)), clip.config, kind.modality)
    if kind.peft_type == "frozen":
        features = compute_features(clip, foundation.image_processor, store, kind.modality, device)
        size = sum(parameter.numel() for parameter in clip.parameters())
        return FrozenEncoder(features.shape[1], size), FeatureStore(features)
    config = lora_config(kind.rank) if kind.peft_type == "lora" else ia3_config()
    return ClipPeftEncoder(clip, config, foundation.image_processor, kind.gradient_checkpointing, kind.modality), store


def ensure_hidden_states(
    dataset: Dataset, clip_model: str, device: torch.device, missing_images: str = "error", anew: bool = False
) -> Path:
    """The path of a data set's hidden states, which are computed first if they are not there, or in any case if `anew`."""
    path = states_path(dataset.folder, dataset.name)
    with build_once(path) as missing:
        if missing or anew:
            foundation = load_foundation(clip_model)
            states = foundation.hidden_states(foundation.store(dataset, missing_images), device)
            save_hidden_states(path, *states, dataset.raw_ids, clip_model)
    return path


def _iisan_encoder(store: HiddenStateStore, config: CLIPConfig | None, modality: str) -> tuple[ItemEncoder, ItemSource]:
    _, num_states, image_dim = store.image_states.shape
    with torch.device("meta"):  # counts parameters without making them
        size = sum(parameter.numel() for parameter in CLIPModel(config).parameters()) if config else None
    return IISANEncoder(IISAN(image_dim, store.text_states.shape[2], num_states, modality=modality), size), store


def clip_folder(clip_model: str, dataset: Dataset) -> str:
    """The folder or hub name of a CLIP; "demo" is the demo's own, which is trained on first use."""
    return str(demo_clip(dataset.folder)) if clip_model == "demo" else clip_model


def build_encoder(
    kind: EncoderKind, dataset: Dataset, clip_model: str | None, device: torch.device, missing_images: str = "error"
) -> tuple[ItemEncoder, ItemSource]:
    """An item encoder and the source of its inputs; IISAN's hidden states are kept on disk.

    Args:
        clip_model: as in `load_foundation`, or "demo" for the demo's own; not looked at where no features are wanted.
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
        return _iisan_encoder(HiddenStateStore.open(dataset, config, clip_model), config, kind.modality)
    return encoder_and_source(kind, load_foundation(clip_model), dataset, device, missing_images)


def trainable_counts(encoder: ItemEncoder) -> dict[str, float]:
    """Parameters of one group's adapter, of all, and one's share of the foundation model (None where its size is unknown)."""
    one = sum(parameter.numel() for parameter in encoder.group_parameters(0).values())
    return {
        "adapter_of_one_group": one,
        "adapters": one * encoder.num_groups,
        "foundation_model": encoder.foundation_parameters,
        "adapter_share_of_foundation_model": one / encoder.foundation_parameters if encoder.foundation_parameters else None,
    }
