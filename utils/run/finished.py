"""A finished run opened again from its folder alone: options, data and model, checked to be those that it was trained with."""
import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils.common.devices import choose_device
from utils.common.errors import PerPEFTError
from utils.data.dataset import Dataset, read_dataset
from utils.run.build import MODEL_OPTIONS, build_model, image_use, needs_contents
from utils.run.distributed import make_accelerator
from utils.run.folder import FINGERPRINTS, contents_fingerprint, dataset_fingerprint, read_summary
from utils.run.options import build_parser
from utils.run.run import Run

Models = Mapping[str, str | None]


def finished_options(
    folder: str | Path, train_dir: str | Path = "./dataset", device: str | None = None, models: Models | None = None
) -> tuple[argparse.Namespace, dict[str, str | None]]:
    """The options of a finished run as a training script parses them, and the fingerprints that its data had, from summary.json.

    The data sets lie in `train_dir` now, and the run's models, by option (MODEL_OPTIONS), in `models` if elsewhere than in
    training. Raises a PerPEFTError if the folder holds no finished run, or its summary is damaged.
    """
    folder = Path(folder)
    if not (folder / "summary.json").is_file():
        what = "is not there" if not folder.is_dir() else "holds no finished run (it has no summary.json)"
        raise PerPEFTError(f"{folder} {what}; name the folder of a run whose training has ended, as in ./runs")
    summary = read_summary(folder / "summary.json")
    defaults = vars(build_parser("", ("lora", "ia3")).parse_args(["--dataset", "any"]))  # of options that change no figure
    options = argparse.Namespace(**{**defaults, **summary["config"]})
    options.train_dir, options.output_dir, options.device = str(train_dir), str(folder.parent), choose_device(device)
    if options.precision == "fp16" and not options.device.startswith("cuda"):
        options.precision = "fp32"  # trained on a GPU, shown elsewhere
    for option, model in (models or {}).items():
        if model and getattr(options, option):  # several runs in one report need not have the same
            setattr(options, option, model)
    return options, {name: summary[name] for name in FINGERPRINTS}


def finished_dataset(options: argparse.Namespace, expected: dict[str, str | None]) -> Dataset:
    """The data set of a finished run, by `finished_options`, with titles and images where they are there to be shown.

    Raises a PerPEFTError if it is not there, or no longer the one that the run was trained on.
    """
    folder, name = Path(options.train_dir), options.dataset
    needed, images = needs_contents(options), image_use(options)
    at_hand = (folder / f"{name}_texts_final.pickle").is_file() and (folder / f"{name}_images").is_dir()
    if at_hand and (not needed or images == "unused"):
        images = "blank"
    dataset = read_dataset(folder, name, needed or at_hand, images)
    changed = f"data set '{name}' is not the one that this run was trained on"
    if dataset_fingerprint(dataset) != expected["dataset_fingerprint"]:
        raise PerPEFTError(changed + FINGERPRINTS["dataset_fingerprint"])
    named = {option: getattr(options, option) for option in MODEL_OPTIONS if getattr(options, option)}
    # A model from the hub left no trace in the fingerprint; a copy of it in a folder may be named now.
    without = argparse.Namespace(**{**vars(options), **dict.fromkeys(named)})
    if expected["contents_fingerprint"] not in [contents_fingerprint(given, dataset) for given in (options, without)]:
        lost = [f"'{model}', which is no folder here, lies elsewhere: name it by --{option} DIR"
                for option, model in named.items() if not Path(model).is_dir()]  # fmt: skip
        moved = f"; or its model {' and '.join(lost)}" if lost else ""
        raise PerPEFTError(changed + FINGERPRINTS["contents_fingerprint"] + moved)
    return dataset


def open_finished(
    folder: str | Path, device: str | None = None, train_dir: str | Path = "./dataset", models: Models | None = None
) -> Run:
    """Rebuild a finished run, its data and its model, which has one group and no trained weights yet; nothing is written.

    Call `load_global`, use the model, then call `load_personalized`, which replaces the global weights. Arguments are
    `finished_options`'; raises a PerPEFTError if the run is not finished, or its data or CLIP is missing or has changed.
    """
    options, expected = finished_options(folder, train_dir, device, models)
    dataset = finished_dataset(options, expected)
    run = Run(options, dataset, *build_model(options, dataset), Path(folder), {}, make_accelerator(options.device))
    run.model.eval()
    return run


def item_number(dataset: Dataset, name: str) -> int:
    """The item of a raw id or, where no item is called so, of a number; raises a PerPEFTError if there is none."""
    if name in dataset.raw_ids:
        return dataset.raw_ids.index(name) + 1
    if name.isascii() and name.isdigit() and 1 <= int(name[:20]) <= dataset.num_items:
        return int(name)
    raise PerPEFTError(f"item '{name}' is neither a raw id of {dataset.name} nor a number from 1 to {dataset.num_items}")


def user_row(dataset: Dataset, number: int) -> int:
    """The row of a user by their number in `{name}_final.txt`; raises a PerPEFTError if there is none."""
    rows = np.flatnonzero(dataset.user_ids == number)
    if not len(rows):
        low, high = dataset.user_ids.min(), dataset.user_ids.max()
        raise PerPEFTError(f"user {number} is not in {dataset.name}_final.txt, whose users' numbers go from {low} to {high}")
    return int(rows[0])
