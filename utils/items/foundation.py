"""Loading foundation models and what prepares their inputs."""
import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPModel
from transformers.utils import logging as transformers_logging

from utils.common.errors import PerPEFTError
from utils.common.files import build_once
from utils.data.dataset import Dataset
from utils.items.hidden_states import compute_hidden_states, save_hidden_states, states_path
from utils.items.store import ImageTitleStore

DEFAULT_CLIP = "openai/clip-vit-base-patch32"


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


def known_config(clip_model: str) -> CLIPConfig | None:
    """The configuration of a CLIP without its weights, from a folder or what the hub's client has kept; else None."""
    with _quiet_transformers(), contextlib.suppress(Exception):
        return CLIPConfig.from_pretrained(clip_model, local_files_only=True)
    return CLIPConfig() if clip_model == DEFAULT_CLIP else None  # the library's defaults are ViT-B/32


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
