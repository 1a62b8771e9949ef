"""A run's settings: the options that its figures follow from, its name, and the comparison with those in its folder."""
import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from utils.common.devices import default_precision
from utils.common.errors import PerPEFTError

# Options that may differ between the start of a run and its continuation: they change no figure.
FREE_OPTIONS = {
    "device", "train_dir", "output_dir", "restart", "inference_only", "save_every", "gradient_checkpointing", "debug",
    "log_with",
}  # fmt: skip
# What identifies the data beside the options, and what a difference means.
FINGERPRINTS = {
    "dataset_fingerprint": " (the data set's interactions or raw ids have changed)",
    "contents_fingerprint": " (the data set's titles or images, or the files of the foundation model, have changed)",
}


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


def has_groups(options: argparse.Namespace) -> bool:
    """Whether a run has groups: the methods that PerPEFT is compared with have none."""
    return options.method == "perpeft"


def minimum_users(options: argparse.Namespace) -> int:
    """How many users a run's data set must have."""
    return options.C if has_groups(options) else 1


def fixed_options(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a run's figures follow from."""
    return {name: value for name, value in sorted(vars(options).items()) if name not in FREE_OPTIONS}


def read_settings(path: Path, nested: bool) -> dict[str, Any]:
    """The settings of a run from its resume/config.json, or from its summary.json, where they are `nested`.

    Raises:
        PerPEFTError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = {**content["config"], **{name: content[name] for name in FINGERPRINTS}} if nested else dict(content)
        if nested:  # runs of earlier versions did not write it
            settings.setdefault("precision", default_precision(content["device"]))
        return settings
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PerPEFTError(f"{path} is damaged ({reason}); start over with --restart, or choose another --output_dir") from error


def check_same_settings(found: dict[str, Any], expected: dict[str, Any], folder: Path) -> None:
    """Compare the settings in a run folder with those of the command.

    Raises:
        PerPEFTError: some differ; names them.
    """
    differing = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    if differing:
        differences = "; ".join(
            f"{name} was {found.get(name)}, is now {expected.get(name)}{FINGERPRINTS.get(name, '')}" for name in differing
        )
        raise PerPEFTError(
            f"{folder} holds a run with other settings: {differences}. Use the same settings to continue it, --restart to "
            "discard it, or another --output_dir or --trial beside it."
        )
