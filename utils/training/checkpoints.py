"""A model on disk: the best weights in forms that open without this project, and the state that a stage continues from."""
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from models import ItemEncoder, PerPEFT
from utils.common.errors import PerPEFTError, first_line, is_out_of_memory
from utils.common.files import folder_written_atomically, save_tensors, write_atomically
from utils.training.progress import Progress
from utils.training.trainer import Trainer


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PerPEFTError(f"{path} is missing; train first, or start over with --restart") from None
    except Exception as error:
        raise PerPEFTError(f"{path} cannot be read ({first_line(error)}); delete it, or start over with --restart") from error


def save_adapter(encoder: ItemEncoder, folder: Path, group: int) -> None:
    """Write a group's adapter: as `folder/adapter/`, which `peft.PeftModel.from_pretrained` opens, or as a state_dict.

    The latter, in `encoder.state_file`, is for kinds that are not peft's. Nothing is written for an encoder without an adapter.
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
    """Read what `save_adapter` wrote into one group's adapter; a damaged file raises errors of its format's library.

    Raises a ValueError for weights of another kind of adapter or another model, or that act at another strength.
    """
    if encoder.adapter_config is None:
        if encoder.group_parameters(group):
            encoder.load_group_state(group, torch.load(folder / encoder.state_file, map_location="cpu", weights_only=True))
        return
    settings = folder / "adapter" / "adapter_config.json"
    saved = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    no_effect = ("dropout", "init", "inference", "low_cpu_mem")  # in the names of settings of training alone, or of loading
    for name, own in encoder.adapter_config.to_dict().items():  # what shapes of weights do not show, such as lora_alpha
        acts = isinstance(own, (bool, int, float)) and not any(part in name for part in no_effect)
        if acts and saved.get(name, own) != own:
            raise ValueError(f"this adapter was saved with {name} {saved[name]}, the model has {own}")
    encoder.load_group_state(group, load_file(str(folder / "adapter" / "adapter_model.safetensors")))


def _save_module(module: torch.nn.Module, path: Path) -> None:
    save_tensors({name: tensor.cpu() for name, tensor in module.state_dict().items()}, path)  # opens without this device


def _group_folders(model: PerPEFT, folder: Path, stage: str) -> list[Path]:
    return [folder] if stage == "global" else [folder / f"group_{group}" for group in range(model.num_groups)]


def save_weights(model: PerPEFT, folder: Path, stage: str) -> None:
    """Write `sasrec.pth` and every group's `projector.pth` and adapter; the folder is replaced as a whole.

    Of the stage "global" all lie in `folder`; of "personalized", each group's projector and adapter in `group_{g}/` there.
    """
    with folder_written_atomically(folder) as temporary:
        _save_module(model.sasrec, temporary / "sasrec.pth")
        for group, own in enumerate(_group_folders(model, temporary, stage)):
            own.mkdir(exist_ok=True)
            _save_module(model.projectors[group], own / "projector.pth")
            save_adapter(model.encoder, own, group)


def load_weights(model: PerPEFT, folder: Path, stage: str) -> None:
    """Read what `save_weights` wrote into a model with as many groups; raises a PerPEFTError if it is missing or does not fit."""
    where = folder
    try:
        model.sasrec.load_state_dict(_read(folder / "sasrec.pth"))
        for group, where in enumerate(_group_folders(model, folder, stage)):
            model.projectors[group].load_state_dict(_read(where / "projector.pth"))
            load_adapter(model.encoder, where, group)
    except PerPEFTError:
        raise
    except Exception as error:  # a damaged file raises errors of its format's library
        raise PerPEFTError(f"the weights in {where} do not fit this model: {error}") from error


class Checkpoint:
    """The state that one stage continues from, in one file that is replaced as a whole; all ranks call, rank 0 writes.

    Attributes:
        saved: how far the state in the file has come, in words; None as long as there is none.
    """

    def __init__(self, path: Path, accelerator: Accelerator):
        self.path, self._accelerator = path, accelerator
        self.saved: str | None = None

    def restore(self, trainer: Trainer, progress: Progress) -> None:
        """Continue from the latest state, if there is one; raises a PerPEFTError if it is damaged or of another run."""
        if not self.path.is_file():
            return
        state = _read(self.path)
        try:
            trainer.load_state_dict(state["trainer"])
            progress.load_state_dict(state["progress"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise PerPEFTError(f"{self.path} is not a state of this run ({reason}); start over with --restart") from error
        self.saved = str(progress)

    def save(self, trainer: Trainer, progress: Progress) -> None:
        """Replace the state by the present one; if a loss or a weight is infinite or NaN, raises a PerPEFTError instead."""
        progress.read_losses()
        if not trainer.is_finite():
            raise progress.not_finite("weights have become infinite or NaN")
        state = {"trainer": trainer.state_dict(), "progress": progress.state_dict()}
        if self._accelerator.is_main_process:
            write_atomically(self.path, lambda temporary: save_tensors(state, temporary))
        self._accelerator.wait_for_everyone()
        self.saved = str(progress)
