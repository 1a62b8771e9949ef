"""What a run's data is recognised by, so that a run continues only on the data that it started with."""
import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.data.dataset import Dataset
from utils.items.model_name import add_model_files, model_folders
from utils.items.store import image_status
from utils.run.build import foundation_name


def dataset_fingerprint(dataset: Dataset) -> str:
    """A hash of histories and raw ids."""
    digest = hashlib.sha256()
    for array in (dataset.user_ids, dataset.histories.items, dataset.histories.offsets):
        digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    digest.update("\0".join(dataset.raw_ids).encode())
    return digest.hexdigest()[:16]


def contents_fingerprint(peft_type: str, dataset: Dataset, models: Sequence[str]) -> str | None:
    """A hash of what the encoder reads beside the histories: titles, sizes of images, and the files of model folders.

    None for IISAN, whose hidden states are checked when they are opened, and where nothing is read. A model from the hub adds
    nothing.
    """
    if peft_type in ("iisan", "none"):
        return None
    digest = hashlib.sha256()
    for title, path in zip(dataset.titles, dataset.image_paths):
        status = image_status(path)
        digest.update(f"{title}\0{status.st_size if status else None}\n".encode())
    for model in models:
        if Path(model).is_dir():
            add_model_files(digest, model)
    return digest.hexdigest()[:16]


def fingerprints(options: argparse.Namespace, dataset: Dataset) -> dict[str, str | None]:
    """Hashes of histories and raw ids, and of what the encoder reads beside them."""
    name = foundation_name(options)
    return {
        "dataset_fingerprint": dataset_fingerprint(dataset),
        "contents_fingerprint": contents_fingerprint(options.peft_type, dataset, model_folders(name) if name else []),
    }
