"""One group's adapter on disk, in forms that open without this project."""
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from models import ItemEncoder
from utils.common.files import save_tensors

# Settings that change no trained adapter's effect: of training, of initial values, of where it came from.
WITHOUT_EFFECT = ("dropout", "init", "inference", "low_cpu_mem")


def save_adapter(encoder: ItemEncoder, folder: Path, group: int) -> None:
    """Write a group's adapter: `folder/adapter/`, which `peft.PeftModel.from_pretrained` opens, or a state_dict of another kind.

    Nothing is written for an encoder without an adapter.
    """
    state, config = encoder.group_state(group), encoder.adapter_config
    if config is None:
        if state:
            save_tensors(state, folder / encoder.state_file)
        return
    adapter = folder / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    # As bytes, so that a full disk is an OSError as anywhere else, and not one of safetensors' own.
    (adapter / "adapter_model.safetensors").write_bytes(safetensors_bytes(state, metadata={"format": "pt"}))
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(adapter))
    config.inference_mode = inference_mode


def load_adapter(encoder: ItemEncoder, folder: Path, group: int) -> None:
    """Read what `save_adapter` wrote into one group's adapter.

    Raises:
        ValueError: the weights are of another kind of adapter or another model, or act at another strength.
        Exception: a damaged file raises errors of its format's library.
    """
    if encoder.adapter_config is None:
        if encoder.group_state(group):
            encoder.load_group_state(group, torch.load(folder / encoder.state_file, map_location="cpu", weights_only=True))
        return
    settings = folder / "adapter" / "adapter_config.json"
    saved = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    for name, own in encoder.adapter_config.to_dict().items():  # what shapes of weights do not show, such as lora_alpha
        is_plain = isinstance(own, (bool, int, float)) and not any(part in name for part in WITHOUT_EFFECT)
        if is_plain and saved.get(name, own) != own:
            raise ValueError(f"this adapter was saved with {name} {saved[name]}, the model has {own}")
    encoder.load_group_state(group, load_file(str(folder / "adapter" / "adapter_model.safetensors")))
