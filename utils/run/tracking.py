"""Every epoch's metrics to TensorBoard or Weights & Biases, through accelerate's trackers."""
import importlib.util
import os
import uuid
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from utils.common.errors import PerPEFTError
from utils.common.files import write_json
from utils.run.folder import read_json

TRACKERS = ("tensorboard", "wandb")  # the names of their packages too


def require_tracker(name: str) -> None:
    """Raise a PerPEFTError, which says how to install it, if a tracker's package is not there."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # without an origin it is only a folder of that name
        raise PerPEFTError(f"--log_with {name} needs a package that is not installed: pip install {name}")


class EpochLog:
    """Logs each epoch once, also when a run is continued; a step is the epoch's number counted over both stages.

    The number of logged rows is kept in the run's `resume/` and written before they are logged. The tracker's files go into the
    run folder's `tensorboard/` or `wandb/`.
    """

    def __init__(self, accelerator: Accelerator, name: str, folder: Path, settings: dict[str, Any]):
        self._accelerator = accelerator
        self._note_path = folder / "resume" / f"{name}.json"
        is_new = not self._note_path.is_file()
        self._note = {"id": uuid.uuid4().hex, "rows": 0} if is_new else read_json(self._note_path, _checked_note)
        config = {key: "none" if value is None else value for key, value in settings.items()} if is_new else None
        if name == "wandb":
            os.environ.setdefault("WANDB_MODE", "offline")
        # One id for all continuations of a run, so that they are one run there too.
        options = {"name": folder.name, "dir": str(folder), "id": self._note["id"], "resume": "allow"}
        project = "perpeft" if name == "wandb" else name  # TensorBoard's folder is called so
        accelerator.init_trackers(project, config, {"wandb": options})
        write_json(self._note_path, self._note)

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Log those that are new of all rows so far, one an epoch, of both stages in order."""
        first = self._note["rows"]
        self._note["rows"] = len(rows)
        write_json(self._note_path, self._note)
        for step, row in enumerate(rows[first:], first + 1):
            values = {f"{row['stage']}/{name}": value for name, value in row.items() if name not in ("stage", "epoch")}
            self._accelerator.log(values, step=step)


def _checked_note(note: dict[str, Any]) -> dict[str, Any]:
    return {"id": str(note["id"]), "rows": int(note["rows"])}
