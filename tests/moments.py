"""Runs a script in a process whose every moment that can matter is an event, at which it can be made to fail."""
import collections
import errno
import gc
import importlib
import os
import pathlib
import shutil
import signal
import sys
from pathlib import Path

import torch
from matplotlib.backends import backend_agg  # noqa: F401  # which the first figure imports
from matplotlib.figure import Figure

from utils.common import console
from utils.items import store
from utils.run import plots, reports
from utils.run import run as run_module
from utils.run.folder import RunFolder
from utils.run.run import Run
from utils.training import checkpoints
from utils.training.evaluation import Evaluator
from utils.training.progress import READ_INTERVALS
from utils.training.trainer import Trainer

PARTS = (  # functions that are parts of a run, named in the labels of the events inside; with "/", parts of the part that calls
    (Run, "train_global", "global"), (Run, "group_users", "grouping"), (Run, "train_personalized", "personalized"),
    (Run, "report", "report"), (Run, "evaluate", "/evaluation"), (checkpoints, "save_weights", "/best weights"),
    (RunFolder, "clear", "/clearing"), (checkpoints.Checkpoint, "save", "/state"), (store.ImageTitleStore, "open", "/store"),
    (reports, "write_metrics", "/write_metrics"), (reports, "write_groups", "/write_groups"),
    (plots, "draw_curves", "/draw_curves"), (plots, "draw_groups", "/draw_groups"), (run_module, "write_json", "/write_json"),
)  # fmt: skip
STEPS = (  # functions whose calls are events
    (store, "read_image"), (Evaluator, "item_table"), (run_module, "kmeans_groups"), (Trainer, "update"), (shutil, "rmtree"),
    *((os, name) for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "posix_fallocate")),
)  # fmt: skip
gc.freeze()  # or the collector of every fork would touch all that is imported, and so copy its pages


class Moments:
    """Writes a label for every event into a file; at one of them the process is killed or fails.

    A label says in which part of the run it happens, as in "personalized/state: before replace .personalized.pt.tmp".

    Args:
        file: of the labels.
        kill_at: (part, number): the process kills itself at this event of this part of the run, counted from 1.
        full_at: (part, number): the disk is full at this event.
        signal_at: (rank, step): the process of this rank sends itself SIGTERM in its step so numbered since it began, from 1.
    """

    def __init__(self, file, kill_at=None, full_at=None, signal_at=None):
        self._file, self._kill_at, self._full_at, self._signal_at = file, kill_at, full_at, signal_at
        self._part, self._counts, self._steps = "opening", collections.Counter(), 0

    def happen(self, what, file=None):
        """One event; if it is the last one, a file that is written in it is left half-written."""
        self._counts[self._part] += 1
        self._file.write(f"{self._part}: {what}\n")
        if what.startswith("before update"):
            self._steps += 1
            if (int(os.environ.get("RANK", 0)), self._steps) == self._signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
        moment = (self._part, self._counts[self._part])
        if moment in (self._kill_at, self._full_at):
            if file is not None:
                file.write(b"PK")  # as files of torch begin
                file.flush()
            if moment == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def hook(self, owner, name, part=""):
        """Make every call of a function two events, before it and after it, and those between events of a part."""
        original = getattr(owner, name)

        def hooked(*args, **options):
            outer = self._part
            self._part = outer + part if part[:1] in ("", "/") else part
            try:
                self.happen(f"before {name}{detail(*args)}")
                result = original(*args, **options)
                self.happen(f"after {name}{detail(*args)}")
                return result
            finally:
                self._part = outer

        setattr(owner, name, hooked)
        if owner is os and hasattr(getattr(pathlib, "_NormalAccessor", None), name):  # through which Path calls os in Python 3.10
            setattr(pathlib._NormalAccessor, name, staticmethod(hooked))

    def install(self):
        """Hook everything that can matter."""
        save = torch.save

        def half_saved(value, file, *args, **options):
            self.happen("during save", file)
            save(value, file, *args, **options)

        torch.save = half_saved
        for hooked in (*PARTS, *STEPS):
            self.hook(*hooked)


def detail(*args):
    """What a label says of a call: the name of a file that comes first, or a loss that comes last."""
    if args and isinstance(args[0], (str, bytes, os.PathLike)):
        return f" {Path(os.fsdecode(args[0])).name}"
    return f" {args[-1].item()!r}" if args and isinstance(args[-1], torch.Tensor) else ""


def write_instead_of_drawing(figure, path, **options):
    """In place of `Figure.savefig`, which takes more time than all the rest of a tiny run."""
    Path(path).write_bytes(b"drawn")


def run_watched(script, arguments, environment, output, events, interval=1, **moments):
    """Run a script's main, its output and the labels of its events in these files; `interval` is that between reads."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({name: str(value) for name, value in environment.items()})
    sys.argv = [f"{script}.py", *arguments]
    Moments(open(events, "w", buffering=1), **moments).install()  # noqa: SIM115  # written line by line, also when killed
    Figure.savefig = write_instead_of_drawing
    READ_INTERVALS["cpu"] = interval
    console.ERROR_GRACE_SECONDS = 0  # no launcher is there that would end the other ranks
    console.run_main(importlib.import_module(script).main)
