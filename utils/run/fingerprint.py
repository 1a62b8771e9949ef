"""What a run's data is recognised by, so that a run continues only on the data that it began with."""
import argparse
import hashlib

import numpy as np

from utils.data.dataset import Dataset
from utils.items.foundation import contents_fingerprint


def dataset_fingerprint(dataset: Dataset) -> str:
    """A hash of histories and raw ids."""
    digest = hashlib.sha256()
    for array in (dataset.user_ids, dataset.histories.items, dataset.histories.offsets):
        digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    digest.update("\0".join(dataset.raw_ids).encode())
    return digest.hexdigest()[:16]


def fingerprints(options: argparse.Namespace, dataset: Dataset) -> dict[str, str | None]:
    """Hashes of histories and raw ids, and of what the encoder reads beside them."""
    return {
        "dataset_fingerprint": dataset_fingerprint(dataset),
        "contents_fingerprint": contents_fingerprint(options.peft_type, dataset, options.clip_model),
    }
