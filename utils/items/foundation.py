"""Loading foundation models and what prepares their inputs."""
import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from models.clip_peft import channel_statistics
from models.pair import EncoderPair
from models.towers import TOWER_NAMES, Traits, skeleton, tower, tower_name
from models.trial import TokenizerMismatch, find_traits
from utils.common.errors import PerPEFTError
from utils.common.files import build_once
from utils.data.dataset import Dataset
from utils.items.hidden_states import compute_hidden_states, has_states, save_hidden_states, states_path
from utils.items.model_name import FoundationName, PairName, model_folders
from utils.items.store import ImageTitleStore, TitleForm, bare_image, output_size, padding_token

DEFAULT_CLIP = "openai/clip-vit-base-patch32"
LONGEST_TITLE = 512  # of models and tokenizers that name no longest input


@dataclass
class Foundation:
    """A dual encoder, or a pair of encoders, with the processors that prepare its inputs; None for images that it lacks."""

    clip: PreTrainedModel | EncoderPair
    image_processor: BaseImageProcessor | None
    tokenizer: PreTrainedTokenizerBase
    name: str = ""

    @cached_property
    def traits(self) -> Traits:
        """How the model reads items, found by trying it.

        Raises:
            PerPEFTError: it does not run on an image and a title alone, or not with these processors; says what is missing.
        """
        parts = ["text"] if self.image_processor is None else ["image", "text"]
        for part in parts:
            if tower_name(self.clip, part) is None:
                raise self._unfit(f"it has no {part} tower called {' or '.join(TOWER_NAMES[part])}")
        image = None if self.image_processor is None else self._tried_image()
        specials = " ".join(self.tokenizer.all_special_tokens)
        titles = ["red lamp of wood and steel", "", "lamp", f"red {specials} lamp", "very long title " * self.longest_title]
        rows = self.tokenizer(titles, truncation=True, max_length=self.longest_title)["input_ids"]
        try:
            with _quiet_transformers():
                return find_traits(self.clip, image, rows, padding_token(self.tokenizer), self.longest_title)
        except TokenizerMismatch as error:
            end = getattr(tower(self.clip, "text").config, "eos_token_id", None)
            raise self._unfit(
                f"its tokenizer does not fit its model: {error}; eos_token_id is {end} in config.json and "
                f"{self.tokenizer.eos_token_id} in the tokenizer, correct the one that is wrong"
            ) from error
        except Exception as error:  # each model has its own ways to refuse inputs
            raise self._unfit(_first_line(error)) from error

    def _tried_image(self) -> torch.Tensor:
        """An image as the processor makes it, which the image tower has taken, [1, 3, height, width]."""
        height, width = output_size(self.image_processor)
        drawn = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        options = {"return_tensors": "np", "input_data_format": "channels_last"}
        image = torch.from_numpy(self.image_processor(drawn, **options)["pixel_values"])
        scale, shift = channel_statistics(self.image_processor)
        own = torch.addcmul(shift, torch.from_numpy(bare_image(drawn, self.image_processor)).float(), scale)
        if (own - image[0]).abs().max() > 1e-3:
            raise self._unfit("its image processor does more than resize, crop, rescale and normalise")
        try:
            with torch.no_grad():
                self.clip.get_image_features(pixel_values=image)
        except Exception as error:
            side = getattr(tower(self.clip, "image").config, "image_size", None)
            if side in (None, height, [height, width]):
                raise self._unfit(_first_line(error)) from error
            size = f"{height} x {width} pixels, its image tower takes {side} x {side}"
            raise self._unfit(f"its parts do not fit together: its image processor makes images of {size}") from error
        return image

    def _unfit(self, reason: str) -> PerPEFTError:
        return PerPEFTError(f"'{self.name}' cannot be used: {reason}")

    @property
    def longest_title(self) -> int:
        """The text tower's longest input, in tokens."""
        text = tower(self.clip, "text")
        longest = getattr(text.config, "max_position_embeddings", None)
        if not longest:
            return min(self.tokenizer.model_max_length, LONGEST_TITLE)
        tables = [module for name, module in text.named_modules() if name.endswith("position_embeddings")]
        reserved = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
        return longest - max(reserved, default=0)  # RoBERTa's family counts positions from its padding token's number on

    @property
    def title_form(self) -> TitleForm:
        """How the text tower reads titles."""
        return TitleForm(self.longest_title, self.traits.pads_titles, self.traits.masks_titles)

    def store(self, dataset: Dataset, missing_images: str = "error") -> ImageTitleStore:
        """A data set's images and titles as this model reads them; images are left out if `missing_images` is "unused"."""
        processor = None if missing_images == "unused" else self.image_processor
        return ImageTitleStore.open(dataset, processor, self.tokenizer, self.title_form, missing_images)

    def hidden_states(
        self, store: ImageTitleStore, device: torch.device, modality: str = "both"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All items' states for IISAN, as in `compute_hidden_states`.

        Raises:
            PerPEFTError: the model has none that IISAN can use.
        """
        try:
            return compute_hidden_states(self.clip, self.traits, self.image_processor, store, device, modality)
        except ValueError as error:
            raise self._unfit(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _quiet_transformers():
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def load_foundation(name: FoundationName, attention: str | None = None) -> Foundation:
    """Load a dual encoder, or a pair of encoders, and the processors from folders or the model hub.

    Args:
        name: a folder as `save_pretrained` writes it, or a name on the hub; or those of a pair.
        attention: transformers' name of how attention is computed; "eager" for the one that returns its weights (default: the
            library's choice, the fastest).
    Raises:
        PerPEFTError: it is neither, of another kind, or its parts do not fit together.
    """
    if isinstance(name, str):
        model = _load_model(name, "--clip_model", attention)
        image_processor, tokenizer = _load_image_processor(name), _load_tokenizer(name)
    else:
        images = _load_model(name.image_model, "--image_model", attention) if name.image_model else None
        model = EncoderPair(images, _load_model(name.text_model, "--text_model", attention), name.text_pooling)
        image_processor = _load_image_processor(name.image_model) if name.image_model else None
        tokenizer = _load_tokenizer(name.text_model)
    foundation = Foundation(model, image_processor, tokenizer, str(name))
    _check_parts(foundation)
    try:
        _ = foundation.traits  # which tries the model
    except PerPEFTError:
        if attention == "eager":
            raise
        return load_foundation(name, "eager")  # a faster one may drop masks that it thinks needless, as AIMv2's does
    return foundation


@contextlib.contextmanager
def _loading(name: str) -> Iterator[dict[str, bool]]:
    """Yield how to load from a folder or the hub; what goes wrong becomes one sentence."""
    is_folder = Path(name).is_dir()
    try:
        with _quiet_transformers():
            # No code from a model's folder is ever run, and nobody is asked whether to run it.
            yield {"local_files_only": is_folder, "trust_remote_code": False}
    except PerPEFTError:
        raise
    except Exception as error:  # the hub's client raises its own kinds for every trouble there can be
        reason = _first_line(error)
        what = "the folder is no complete model folder" if is_folder else "there is no such folder and the hub has none"
        raise PerPEFTError(
            f"CLIP weights '{name}' cannot be loaded: {what} ({reason}). Run once with network access so that they are "
            "downloaded, or name a CLIPModel folder by --clip_model DIR, or train a small one on your data with "
            "python3 -m scripts.make_small_clip --dataset NAME and pass its folder."
        ) from error


def _load_model(name: str, option: str, attention: str | None) -> PreTrainedModel:
    with _loading(name) as source:
        config = AutoConfig.from_pretrained(name, **source)
        _require_kind(name, type(config), option)
        model, loading = AutoModel.from_pretrained(name, output_loading_info=True, attn_implementation=attention, **source)
        absent = [*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])]
        # the library would go on with random weights; a single encoder's own pooling layer is not used
        absent = [key for key in absent if option == "--clip_model" or not key.startswith("pooler.")]
        if absent:
            raise ValueError(f"its weights lack {', '.join(absent[:3])}")
        return model.float()


def _require_kind(name: str, kind: type[PretrainedConfig], option: str) -> None:
    """Check by its class that a model is what an option takes.

    Raises:
        PerPEFTError: it is not; says what is missing.
    """
    found = MODEL_MAPPING.get(kind, None)
    absent = [method for method in ("get_image_features", "get_text_features") if not hasattr(found, method)]
    takes, missing = {
        "--clip_model": (f"a dual encoder, as {DEFAULT_CLIP} or google/siglip-base-patch16-224", " or ".join(absent)),
        "--image_model": ("an image encoder, as facebook/dinov2-base", "" if _reads(found, "pixel_values") else "image input"),
        "--text_model": ("a text encoder, as intfloat/e5-base-v2", "" if _reads(found, "input_ids") else "text input of its own"),
    }[option]
    if missing:
        raise PerPEFTError(
            f"'{name}' is a model of the kind '{kind.model_type}', which does not fit: {option} takes {takes}, and this has no "
            f"{missing}"
        )


def _reads(model_class: type | None, name: str) -> bool:
    return getattr(model_class, "main_input_name", None) == name and not hasattr(model_class, "get_image_features")


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    with _loading(name) as source:
        return AutoTokenizer.from_pretrained(name, **source)


def _load_image_processor(name: str) -> BaseImageProcessor:
    with _loading(name) as source:
        try:
            return AutoImageProcessor.from_pretrained(name, use_fast=False, **source)
        except OSError:
            # transformers 5 saves a processor's parts in one file, which transformers 4 does not read.
            path = cached_file(name, "processor_config.json", local_files_only=source["local_files_only"])
            settings = json.loads(Path(path).read_text(encoding="utf-8"))["image_processor"]
        kind = settings["image_processor_type"].removesuffix("Fast").removesuffix("Pil")
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings | {"image_processor_type": kind}))
            return AutoImageProcessor.from_pretrained(folder, use_fast=False, trust_remote_code=False)


def _check_parts(foundation: Foundation) -> None:
    """Check that image sizes are one, and that the text tower has all tokens.

    Raises:
        PerPEFTError: they do not; names the first that does not.
    """
    wrong, text = None, tower(foundation.clip, "text") if tower_name(foundation.clip, "text") else None
    if foundation.image_processor is not None:
        try:
            output_size(foundation.image_processor)
        except ValueError as error:
            wrong = str(error)
    rows = getattr(text.config, "vocab_size", None) if text else None
    highest = max(foundation.tokenizer.get_vocab().values())
    if not wrong and rows and highest >= rows:
        wrong = f"its tokenizer has tokens up to number {highest}, its text tower {rows} token embeddings"
    if wrong:
        raise PerPEFTError(
            f"the parts of '{foundation.name}' do not fit together: {wrong}; save them again with the right settings"
        )


def known_model(name: FoundationName) -> nn.Module | None:
    """A model without its weights, from the settings in a folder or what the hub's client has kept; else None."""
    with _quiet_transformers(), contextlib.suppress(Exception):
        if name == DEFAULT_CLIP:
            return skeleton(CLIPConfig())  # the library's defaults are ViT-B/32
        parts = [AutoConfig.from_pretrained(part, local_files_only=True, trust_remote_code=False) for part in model_folders(name)]
        models = [skeleton(part) for part in parts]
        if isinstance(name, PairName):
            return EncoderPair(models[0] if name.image_model else None, models[-1], name.text_pooling)
        return models[0]
    return None


def ensure_hidden_states(
    dataset: Dataset,
    name: FoundationName,
    device: torch.device,
    missing_images: str = "error",
    modality: str = "both",
    recompute: bool = False,
) -> Path:
    """The path of a data set's hidden states, which are computed first if they are not there, or in any case if `recompute`."""
    path = states_path(dataset.folder, dataset.name)
    with build_once(path) as missing:
        if missing or recompute or not has_states(dataset.folder, dataset.name, modality):
            foundation = load_foundation(name)
            states = foundation.hidden_states(foundation.store(dataset, missing_images), device, modality)
            save_hidden_states(path, *states, dataset.raw_ids, name)
    return path
