"""The run folder: named for its options, bound to all that determines its metrics, and either new, started or finished."""
import argparse
import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from utils.common.errors import PerPEFTError
from utils.common.files import remove_leftovers, write_json
from utils.data.dataset import Dataset
from utils.items.hidden_states import made_by, states_path
from utils.items.model_files import add_model_files, model_folders, model_hash
from utils.items.store import image_status
from utils.run.build import MODEL_OPTIONS, foundation_name, image_use
from utils.training.evaluation import METRICS, SPLITS

# Options that may differ between the start of a run and its continuation: they change no metric.
FREE_OPTIONS = {
    "device", "train_dir", "output_dir", "restart", "inference_only", "save_every", "gradient_checkpointing", "debug", "log_with"
}  # fmt: skip
# What identifies the data beside the options, and what a difference means.
FINGERPRINTS = {
    "dataset_fingerprint": " (the data set's interactions or raw ids have changed)",
    "contents_fingerprint": " (the data set's titles or images, or the files of the foundation model, have changed)",
}
RUN_FILES = (
    "resume", "global", "personalized", "global_ranks.csv", "personalized_ranks.csv", "groups.csv", "metrics.csv", "curves.png",
    "groups.png", "figures", "report.html", "tensorboard", "wandb",
)  # fmt: skip  # and summary.json


def run_name(options: argparse.Namespace) -> str:
    """The run folder's name: data set, adapter, what differs from PerPEFT if anything, learning rate, weight decay, seed."""
    parts = [options.dataset, options.peft_type]
    if options.peft_config:
        parts.append(f"config_{hashlib.sha256(json.dumps(options.peft_config, sort_keys=True).encode()).hexdigest()[:6]}")
    if options.method in ("global", "large_global"):  # frozen and none stand in the adapter's place
        parts.append(options.method)
    if options.modality != "both":
        parts.append(options.modality)
    if options.negatives != "group":
        parts.append(f"negatives_{options.negatives}")
    if options.grouping != "kmeans":
        parts.append(f"grouping_{options.grouping}")
    return "_".join([*parts, f"lr{options.lr:g}", f"wd{options.wdecay:g}", f"seed{options.trial}"])


def fixed_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that determine a run's metrics, as JSON holds them."""
    return json.loads(json.dumps({name: value for name, value in sorted(vars(options).items()) if name not in FREE_OPTIONS}))


def dataset_fingerprint(dataset: Dataset) -> str:
    """A hash of histories and raw ids."""
    digest = hashlib.sha256()
    for array in (dataset.user_ids, dataset.histories.items, dataset.histories.offsets):
        digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    digest.update("\0".join(dataset.raw_ids).encode())
    return digest.hexdigest()[:16]


def contents_fingerprint(options: argparse.Namespace, dataset: Dataset) -> str | None:
    """A hash of what the encoder reads beside the histories: titles, sizes of images, and the files of model folders.

    None for IISAN, whose hidden states are checked when they are opened, and where nothing is read. A model from the hub adds
    nothing, and so do images that are not used.
    """
    if options.peft_type in ("iisan", "none"):
        return None
    digest = hashlib.sha256()
    for title, path in zip(dataset.titles, dataset.image_paths):
        status = None if image_use(options) == "unused" else image_status(path)
        digest.update(f"{title}\0{status.st_size if status else None}\n".encode())
    if name := foundation_name(options):
        add_model_files(digest, name)
    return digest.hexdigest()[:16]


def run_settings(options: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
    """All that determines a run's metrics."""
    settings = fixed_options(options) | {"dataset_fingerprint": dataset_fingerprint(dataset)}
    return settings | {"contents_fingerprint": contents_fingerprint(options, dataset)}


def with_moved_models(
    settings: dict[str, Any], saved: dict[str, Any] | None, options: argparse.Namespace, dataset: Dataset
) -> dict[str, Any]:
    """The command's settings, under the saved run's names of model folders where these have only moved."""
    name = foundation_name(options)
    moved = saved is not None and any(saved.get(option) != settings[option] for option in MODEL_OPTIONS)
    if not moved or name is None or not all(Path(folder).is_dir() for folder in model_folders(name)):
        return settings
    same = saved.get("contents_fingerprint") == settings["contents_fingerprint"]
    if options.peft_type == "iisan":  # whose fingerprint is None: the note beside its states says what made them
        states = states_path(dataset.folder, dataset.name)
        noted = states.with_suffix(".json").is_file()  # published states have no note
        saved_name = foundation_name(argparse.Namespace(**{**vars(options), **saved}))
        same = noted and made_by(states) == (str(saved_name), model_hash(name))
    return settings | {option: saved[option] for option in MODEL_OPTIONS if same and option in saved}


def read_json(path: Path, parse: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What `parse` makes of the JSON in a file of a run; raises a PerPEFTError if it is damaged."""
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PerPEFTError(f"{path} is damaged ({reason}); start over with --restart, or choose another --output_dir") from error


def read_summary(path: Path) -> dict[str, Any]:
    """A finished run's summary.json; raises a PerPEFTError if it is damaged, or lacks settings or results."""
    return read_json(path, _checked_summary)


def _checked_summary(summary: dict[str, Any]) -> dict[str, Any]:
    for stage in ("global", "personalized") if summary["config"]["method"] == "perpeft" else ("global",):
        for value in (summary[stage]["best_epoch"], *(summary[stage][split][name] for split in SPLITS for name in METRICS)):
            float(value)
    settings_of(summary)
    return summary


def settings_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The settings of a finished run: all that determines its metrics."""
    return {**summary["config"], **{name: summary[name] for name in FINGERPRINTS}}


class RunFolder:
    """One run folder, `path`: `{output_dir}/{run name}`."""

    def __init__(self, path: Path):
        self.path = path
        self._resume, self._summary = path / "resume", path / "summary.json"
        self._config = self._resume / "config.json"

    def lock(self) -> contextlib.AbstractContextManager:
        """Make the folder and keep other processes from training in it, until the returned lock is released.

        Raises a PerPEFTError if it cannot be made, or another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Held by the operating system: a process that dies releases it.
            return FileLock(self.path / ".lock").acquire(blocking=False)
        except Timeout:
            busy = f"another process is training in {self.path}; wait for it, or choose another --output_dir"
            raise PerPEFTError(busy) from None
        except OSError as error:
            raise PerPEFTError(f"cannot make the run folder {self.path} ({error}); choose another --output_dir") from error

    @property
    def is_finished(self) -> bool:
        """Whether a run has ended here."""
        return self._summary.is_file()

    @property
    def has_state(self) -> bool:
        """Whether a run was started here and has a state to continue from."""
        return self._config.is_file() and any(self._resume.glob("*.pt"))

    def saved_settings(self) -> dict[str, Any] | None:
        """The settings of the run that is here, finished or started; None where there is nothing to continue.

        Raises a PerPEFTError if they are damaged.
        """
        if self.is_finished:
            return settings_of(read_summary(self._summary))
        return read_json(self._config, dict) if self.has_state else None

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Refuse to mix runs: raise a PerPEFTError if the folder holds a run with other settings."""
        saved = self.saved_settings()
        names = [] if saved is None else sorted(saved.keys() | settings.keys())
        differences = "; ".join(
            f"{name} was {saved.get(name)}, is now {settings.get(name)}{FINGERPRINTS.get(name, '')}"
            for name in names
            if saved.get(name) != settings.get(name)
        )
        if differences:
            raise PerPEFTError(
                f"{self.path} holds a run with other settings: {differences}. Use the same settings to continue it, --restart to "
                "discard it, or another --output_dir or --trial beside it."
            )

    def begin(self, settings: dict[str, Any], started: bool) -> None:
        """Prepare the folder: continue the run that has started here, or clear it for a new one."""
        if started:
            remove_leftovers(self.path)
            print(f"continuing {self.path}", flush=True)
            return
        self.clear()  # without a saved state there is nothing to lose, and the rest of a half-cleared run must not be used
        self._resume.mkdir()
        write_json(self._config, settings)

    def clear(self) -> None:
        """Remove the files of a run, and nothing else that is there."""
        remove_leftovers(self.path)
        # What marks a run goes first: after a kill in between there is nothing to continue, and the next start clears the rest.
        for path in (self._config, self._summary, *(self.path / name for name in RUN_FILES)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def remove_state(self) -> None:
        """Remove what only a continuation needs."""
        shutil.rmtree(self._resume, ignore_errors=True)
