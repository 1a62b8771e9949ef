"""Loading foundation models and what prepares their inputs."""
import contextlib
import json
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
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

from models.pair import IMAGE_MODELS, TEXT_MODELS, EncoderPair, PairConfig
from models.towers import ARCHITECTURES, architecture, pooled_places
from utils.common.errors import PerPEFTError
from utils.common.files import build_once
from utils.data.dataset import Dataset
from utils.items.hidden_states import compute_hidden_states, save_hidden_states, states_path
from utils.items.model_name import FoundationName, PairName, model_folders
from utils.items.store import ImageTitleStore, TitleForm, output_size

DEFAULT_CLIP = "openai/clip-vit-base-patch32"


@dataclass
class Foundation:
    """A dual encoder, or a pair of encoders, with the processors that prepare its inputs; None for images that it lacks."""

    clip: PreTrainedModel | EncoderPair
    image_processor: BaseImageProcessor | None
    tokenizer: PreTrainedTokenizerBase

    @property
    def title_form(self) -> TitleForm:
        """How the text tower reads titles."""
        family, longest = architecture(self.clip.config), self.clip.config.text_config.max_position_embeddings
        longest -= family.reserved_positions
        return TitleForm(longest, family.pads_titles, family.masks_titles)

    def store(self, dataset: Dataset, missing_images: str = "error") -> ImageTitleStore:
        """A data set's images and titles as this model reads them.

        Raises:
            PerPEFTError: its tokenizer does not end titles with the token that the model pools.
        """
        self._check_pooled_token(dataset.titles[0])
        return ImageTitleStore.open(dataset, self.image_processor, self.tokenizer, self.title_form, missing_images)

    def _check_pooled_token(self, title: str) -> None:
        if architecture(self.clip.config).title_token != "end":
            return
        tokens = self.tokenizer([f"a {title}"[:40]], truncation=True, max_length=self.title_form.max_length)["input_ids"][0]
        found = int(pooled_places(self.clip.config, torch.tensor([tokens]))[0])
        first = tokens.index(self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id in tokens else None
        if found != first:
            raise PerPEFTError(
                f"the tokenizer of '{self.clip.config._name_or_path}' does not fit its model: it ends a title by token "
                f"{tokens[-1]} (its eos_token_id is {self.tokenizer.eos_token_id}), but by eos_token_id "
                f"{self.clip.config.text_config.eos_token_id} in config.json the model pools token {tokens[found]}; correct the "
                "one that is wrong"
            )

    def hidden_states(self, store: ImageTitleStore, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All items' states for IISAN, as in `compute_hidden_states`."""
        return compute_hidden_states(self.clip, self.image_processor, store, device)


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
        model = _load_model(name, "--clip_model", ARCHITECTURES, attention)
        image_processor, tokenizer = _load_image_processor(name), _load_tokenizer(name)
    else:
        images = _load_model(name.image_model, "--image_model", IMAGE_MODELS, attention) if name.image_model else None
        text = _load_model(name.text_model, "--text_model", TEXT_MODELS, attention)
        model = EncoderPair(images, text, name.text_pooling)
        image_processor = _load_image_processor(name.image_model) if name.image_model else None
        tokenizer = _load_tokenizer(name.text_model)
    _check_parts(str(name), model, image_processor, tokenizer)
    return Foundation(model, image_processor, tokenizer)


@contextlib.contextmanager
def _loading(name: str) -> Iterator[dict[str, bool]]:
    """Yield how to load from a folder or the hub; what goes wrong becomes one sentence."""
    is_folder = Path(name).is_dir()
    try:
        with _quiet_transformers():
            # No code from a model's folder is ever run, nor is it asked whether it should be.
            yield {"local_files_only": is_folder, "trust_remote_code": False}
    except PerPEFTError:
        raise
    except Exception as error:  # the hub's client raises its own kinds for every trouble there can be
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = "the folder is no complete model folder" if is_folder else "there is no such folder and the hub gave none"
        raise PerPEFTError(
            f"CLIP weights '{name}' cannot be loaded: {what} ({reason}). Run once with network access so that they are "
            "downloaded, or name a CLIPModel folder by --clip_model DIR, or train a small one on your data with "
            "python3 -m scripts.make_small_clip --dataset NAME and pass its folder."
        ) from error


def _load_model(name: str, option: str, kinds: Collection[str], attention: str | None) -> PreTrainedModel:
    with _loading(name) as source:
        config = AutoConfig.from_pretrained(name, **source)
        kind = config.model_type
        if kind not in kinds:
            raise PerPEFTError(
                f"'{name}' is a model of the kind '{kind}', which does not fit: {option} takes {', '.join(sorted(kinds))}"
                + (f", as {DEFAULT_CLIP} or google/siglip-base-patch16-224" if option == "--clip_model" else "")
            )
        model, loading = AutoModel.from_pretrained(name, output_loading_info=True, attn_implementation=attention, **source)
        absent = [*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])]
        # the library would go on with random weights; a single encoder's own pooling layer is not used
        absent = [key for key in absent if option == "--clip_model" or not key.startswith("pooler.")]
        if absent:
            raise ValueError(f"its weights lack {', '.join(absent[:3])}")
        return model


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


def _check_parts(
    name: str, model: nn.Module, image_processor: BaseImageProcessor | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that the parts of a foundation model go together.

    Raises:
        PerPEFTError: they do not; names the first that does not.
    """
    family, rows = architecture(model.config), model.config.text_config.vocab_size
    wrong = None if image_processor is None else _wrong_image_size(model.config, image_processor)
    highest = max(tokenizer.get_vocab().values())
    if not wrong and highest >= rows:
        wrong = f"its tokenizer has tokens up to number {highest}, its text tower {rows} token embeddings"
    elif not wrong and family.title_token == "end" and tokenizer.eos_token_id is None:
        wrong = "its tokenizer has no end-of-text token (eos_token), which its text tower pools"
    if wrong:
        raise PerPEFTError(f"the parts of '{name}' do not fit together: {wrong}; save them again with the right settings")


def _wrong_image_size(config: PretrainedConfig, image_processor: BaseImageProcessor) -> str | None:
    side = config.vision_config.image_size
    try:
        size = output_size(image_processor)
    except ValueError as error:
        return str(error)
    if size == (side, side) or architecture(config).any_image_size:
        return None
    return f"its image processor makes images of {size[0]} x {size[1]} pixels, its image tower takes {side} x {side}"


def known_config(name: FoundationName) -> PretrainedConfig | PairConfig | None:
    """The configuration of a model without its weights, from a folder or what the hub's client has kept; else None."""
    with _quiet_transformers(), contextlib.suppress(Exception):
        found = [AutoConfig.from_pretrained(part, local_files_only=True, trust_remote_code=False) for part in model_folders(name)]
        if isinstance(name, PairName):
            return PairConfig(found[0] if name.image_model else None, found[-1], name.text_pooling)
        return found[0] if found[0].model_type in ARCHITECTURES else None
    return CLIPConfig() if name == DEFAULT_CLIP else None  # the library's defaults are ViT-B/32


def ensure_hidden_states(
    dataset: Dataset, name: FoundationName, device: torch.device, missing_images: str = "error", anew: bool = False
) -> Path:
    """The path of a data set's hidden states, which are computed first if they are not there, or in any case if `anew`."""
    path = states_path(dataset.folder, dataset.name)
    with build_once(path) as missing:
        if missing or anew:
            foundation = load_foundation(name)
            states = foundation.hidden_states(foundation.store(dataset, missing_images), device)
            save_hidden_states(path, *states, dataset.raw_ids, name)
    return path
