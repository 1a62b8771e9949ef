"""Item and user vectors of a finished run as plain arrays, for a vector search engine: an inner product is the model's score."""
from pathlib import Path

import numpy as np
import torch

from utils.common.errors import PerPEFTError
from utils.common.files import folder_written_atomically
from utils.run.build import has_groups
from utils.run.run import Run
from utils.training.evaluation import last_states


def _save_items(path: Path, table: torch.Tensor) -> None:
    np.save(path, table[1:].cpu().numpy().astype(np.float32))  # without the padding item: row i is item i + 1


def export_vectors(run: Run, folder: Path, histories: str) -> dict[str, tuple[int, ...]]:
    """Write item vectors by every group's and the global model, and user vectors by each user's own group.

    `items_global.npy` and, for every group, `items_group_{g}.npy`, [num_items, hidden]; `users.npy` [users, hidden];
    `item_ids.txt` and `user_ids.txt`, one line a row; `user_groups.npy` [users], in runs with groups. Vectors are float32. The
    score of an item for a user is the inner product of the user's row with the item's row in the table of the user's group, or
    in `items_global.npy` in runs without groups.

    Args:
        run: from `open_finished`.
        folder: a new folder.
        histories: "all", or "train_and_valid" for those that the test metrics were computed from.
    Returns:
        each array's shape by its file's name
    Raises:
        PerPEFTError: the folder exists, or the weights cannot be read.
    """
    if folder.exists():
        raise PerPEFTError(f"{folder} exists; remove it, or choose another folder by --output")
    dataset, grouped = run.dataset, has_groups(run.options)
    exported = dataset.histories if histories == "all" else run.split.train_and_valid
    users = np.zeros((dataset.num_users, run.options.hidden_units), dtype=np.float32)
    with folder_written_atomically(folder) as temporary:
        run.load_global()
        table = run.item_table(0)
        _save_items(temporary / "items_global.npy", table)
        if grouped:
            run.load_personalized()
            np.save(temporary / "user_groups.npy", run.groups)
        for group in range(run.model.num_groups):
            if grouped:
                table = run.item_table(group)
                _save_items(temporary / f"items_group_{group}.npy", table)
            members = np.flatnonzero(run.groups == group)
            users[members] = last_states(run.model.sasrec, table, exported, members).cpu().numpy()
        np.save(temporary / "users.npy", users)
        for name, ids in (("item_ids.txt", dataset.raw_ids), ("user_ids.txt", dataset.user_ids.tolist())):
            (temporary / name).write_text("".join(f"{each}\n" for each in ids), encoding="utf-8")
    return {path.name: np.load(path, mmap_mode="r").shape for path in sorted(folder.glob("*.npy"))}
