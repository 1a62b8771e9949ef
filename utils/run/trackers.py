"""Metrics of every epoch to TensorBoard or Weights & Biases, through accelerate; nothing leaves the machine by itself."""
import importlib.util
import json
import os
import uuid
from pathlib import Path
from typing import Any

from utils.common.errors import PerPEFTError
from utils.common.files import write_text_atomically

NONE = "none"
TRACKERS = (NONE, "tensorboard", "wandb")  # tensorboard and wandb are the names of their packages too
PROJECT = "perpeft"  # under which wandb gathers runs


def require_tracker(name: str) -> None:
    """Check that a tracker's package is there.

    Raises:
        PerPEFTError: it is not; says how to install it.
    """
    if name == NONE:
        return
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # without an origin it is but a folder of that name
        raise PerPEFTError(f"--log_with {name} needs a package that is not installed: pip install {name}")


class NoTracker:
    """Takes rows and does nothing with them; the interface of `Tracker`."""

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Log those rows that are new.

        Args:
            rows: one an epoch, of both stages, in order, from the first on.
        """

    def finish(self) -> None:
        """Close what is open."""


class Tracker(NoTracker):
    """Logs a row an epoch, its step being the epoch's number counted over both stages, and the settings once.

    How many rows were logged is kept in the run's `resume/`, and is noted before they are: a continued run logs none twice.

    Args:
        name: of `TRACKERS`, not none.
        folder: the run folder; the files go into its `tensorboard/` or `wandb/`.
        settings: of the run.
    """

    def __init__(self, name: str, folder: Path, settings: dict[str, Any]):
        self._note_path = folder / "resume" / f"{name}.json"
        is_new = not self._note_path.is_file()
        self._note = {"id": uuid.uuid4().hex, "rows": 0} if is_new else _read_note(self._note_path)
        self._tracker = _started(name, folder, self._note["id"])
        if is_new:
            self._keep_note()
            # TensorBoard's table of settings takes no None.
            self._tracker.store_init_configuration({key: NONE if value is None else value for key, value in settings.items()})

    def _keep_note(self) -> None:
        write_text_atomically(self._note_path, json.dumps(self._note) + "\n")

    def log(self, rows: list[dict[str, Any]]) -> None:
        """Log those rows that are new."""
        first = self._note["rows"]
        self._note["rows"] = len(rows)
        self._keep_note()
        for number, row in enumerate(rows[first:], first + 1):
            values = {f"{row['stage']}/{name}": value for name, value in row.items() if name not in ("stage", "epoch")}
            self._tracker.log(values, step=number)

    def finish(self) -> None:
        """Close what is open."""
        self._tracker.finish()


def _read_note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return {"id": str(note["id"]), "rows": int(note["rows"])}
    except (KeyError, TypeError, ValueError) as error:
        raise PerPEFTError(f"{path} is damaged ({error}); start over with --restart") from error


def _started(name: str, folder: Path, run_id: str) -> Any:
    from accelerate import tracking  # only here: it takes time to import

    if name == "tensorboard":
        tracker = tracking.TensorBoardTracker("tensorboard", logging_dir=folder)
    else:
        os.environ.setdefault("WANDB_MODE", "offline")
        # One id for all continuations of a run, so that they are one run there too.
        tracker = tracking.WandBTracker(PROJECT, name=folder.name, dir=str(folder), id=run_id, resume="allow")
    tracker.start()
    return tracker


def open_tracker(name: str, folder: Path, settings: dict[str, Any]) -> NoTracker:
    """A tracker by its name in `TRACKERS`; arguments as of `Tracker`."""
    return NoTracker() if name == NONE else Tracker(name, folder, settings)
