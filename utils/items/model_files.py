"""The files of a foundation model, in a folder or on the model hub: their names and hash; weights, tokenizer, image processor."""
import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import transformers
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, CLIPConfig, PretrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from models.pair import EncoderPair
from models.towers import skeleton
from utils.common.errors import PerPEFTError, first_line

DEFAULT_CLIP = "openai/clip-vit-base-patch32"


@dataclass(frozen=True)
class PairName:
    """Names of two single encoders in place of a dual encoder's, each a folder or a name on the hub."""

    image_model: str | None  # None for titles alone
    text_model: str
    text_pooling: str = "mean"  # or "cls"

    def __str__(self) -> str:
        return " + ".join(model_folders(self)) + f" ({self.text_pooling})"


FoundationName = str | PairName
FoundationParts = tuple[PreTrainedModel | EncoderPair, BaseImageProcessor | None, PreTrainedTokenizerBase | None]


def model_options(name: FoundationName) -> str:
    """The options that name a foundation model, as one types them."""
    if isinstance(name, str):
        return f"--clip_model {name}"
    image = f"--image_model {name.image_model} " if name.image_model else ""
    return f"{image}--text_model {name.text_model} --text_pooling {name.text_pooling}"


def model_folders(name: FoundationName) -> list[str]:
    """The folders or hub names that a foundation model's files lie in."""
    return [name] if isinstance(name, str) else [part for part in (name.image_model, name.text_model) if part]


def add_model_files(digest: "hashlib._Hash", name: FoundationName) -> None:
    """Add settings and weights in a model's folders to a hash; what lies on the hub adds nothing."""
    for folder in map(Path, model_folders(name)):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.suffix in (".json", ".txt", ".safetensors", ".bin"):
                with path.open("rb") as file:
                    for block in iter(lambda: file.read(2**20), b""):
                        digest.update(block)


def model_hash(name: FoundationName) -> str | None:
    """What a model is recognised by wherever its folders lie; None for names on the hub."""
    if not all(Path(folder).is_dir() for folder in model_folders(name)):
        return None
    digest = hashlib.sha256()
    add_model_files(digest, name)
    if isinstance(name, PairName):
        digest.update(name.text_pooling.encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from printing anything but errors, progress bars included where nobody watches a terminal."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def known_model(name: FoundationName) -> nn.Module | None:
    """A model without its weights, from the settings in a folder or what the hub's client has kept; else None."""
    with quiet_transformers(), contextlib.suppress(Exception):
        if name == DEFAULT_CLIP:
            return skeleton(CLIPConfig())  # the library's defaults are ViT-B/32
        source = {"local_files_only": True, "trust_remote_code": False}
        *images, text = (skeleton(AutoConfig.from_pretrained(folder, **source)) for folder in model_folders(name))
        return text if isinstance(name, str) else EncoderPair(images[0] if images else None, text, name.text_pooling)
    return None


def load_parts(name: FoundationName, attention: str | None) -> FoundationParts:
    """Model in float32, image processor (None for titles alone) and tokenizer; arguments and errors as in `load_foundation`."""
    if isinstance(name, str):
        return _load(name, "--clip_model", attention)
    images, image_processor, _ = _load(name.image_model, "--image_model", attention) if name.image_model else (None, None, None)
    texts, _, tokenizer = _load(name.text_model, "--text_model", attention)
    return EncoderPair(images, texts, name.text_pooling), image_processor, tokenizer


def _load(name: str, option: str, attention: str | None) -> FoundationParts:
    """Load what an option stands for from a folder or the hub; what goes wrong becomes one sentence that names the option."""
    is_folder = Path(name).is_dir()
    # No code from a model's folder is ever run, and nobody is asked whether to run it.
    source = {"local_files_only": is_folder, "trust_remote_code": False}
    try:
        with quiet_transformers():
            model = _load_model(name, option, attention, source)
            image_processor = None if option == "--text_model" else _load_image_processor(name, source)
            tokenizer = None if option == "--image_model" else AutoTokenizer.from_pretrained(name, **source)
            return model, image_processor, tokenizer
    except PerPEFTError:
        raise
    except Exception as error:  # the hub's client raises its own kinds for every trouble there can be
        what = "the folder is no complete model folder" if is_folder else "there is no such folder and the hub has none"
        small = ", or train a small CLIP on your data with python3 -m scripts.make_small_clip --dataset NAME and pass its folder"
        raise PerPEFTError(
            f"{option} '{name}' cannot be loaded: {what} ({first_line(error)}). Run once with network access so that it is "
            f"downloaded, or pass the folder of a model by {option} DIR{small if option == '--clip_model' else ''}."
        ) from error


def _load_model(name: str, option: str, attention: str | None, source: dict[str, bool]) -> PreTrainedModel:
    _require_kind(name, type(AutoConfig.from_pretrained(name, **source)), option)
    model, loading = AutoModel.from_pretrained(name, output_loading_info=True, attn_implementation=attention, **source)
    if attention is not None and hasattr(model, "set_attn_implementation"):  # transformers 4.57 forgets the towers
        model.set_attn_implementation(attention)
    absent = [*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])]
    # the library would go on with random weights; a single encoder's own pooling layer is not used
    absent = [key for key in absent if option == "--clip_model" or not key.startswith("pooler.")]
    if absent:
        raise ValueError(f"its weights lack {', '.join(absent[:3])}")
    return model.float()


def _require_kind(name: str, kind: type[PretrainedConfig], option: str) -> None:
    """Raise a PerPEFTError that says what is missing unless a model is, by its class, what an option takes."""
    found = MODEL_MAPPING.get(kind, None)
    absent = [method for method in ("get_image_features", "get_text_features") if not hasattr(found, method)]
    own_input = None if hasattr(found, "get_image_features") else getattr(found, "main_input_name", None)
    takes, missing = {
        "--clip_model": (f"a dual encoder such as {DEFAULT_CLIP} or google/siglip-base-patch16-224", " or ".join(absent)),
        "--image_model": ("an image encoder such as facebook/dinov2-base", "" if own_input == "pixel_values" else "image input"),
        "--text_model": ("a text encoder such as intfloat/e5-base", "" if own_input == "input_ids" else "text input of its own"),
    }[option]
    if missing:
        raise PerPEFTError(
            f"'{name}' is a model of the kind '{kind.model_type}', which does not fit: {option} takes {takes}, and this has no "
            f"{missing}"
        )


def _load_image_processor(name: str, source: dict[str, bool]) -> BaseImageProcessor:
    """A model's own image processor, as either transformers 4 or 5 saves it."""
    try:
        return AutoImageProcessor.from_pretrained(name, use_fast=False, **source)
    except OSError:
        # transformers 5 saves a processor's parts in one file, which transformers 4 does not read.
        path = cached_file(name, "processor_config.json", local_files_only=source["local_files_only"])
        settings = json.loads(Path(path).read_text(encoding="utf-8"))["image_processor"]
    kind = settings["image_processor_type"].removesuffix("Fast").removesuffix("Pil")
    return getattr(transformers, kind).from_dict(settings)
