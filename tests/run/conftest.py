"""Runs that have not started, one that was interrupted, and one that was not disturbed."""
import contextlib
import io
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.peft_configs import PEFT_TYPES
from tests import zygote
from tests.conftest import exit_code, fresh_data, parsed, run_interrupted, run_script, tiny_arguments
from tests.run_files import leftovers, outcome
from utils.run.folder import run_name
from utils.training.trainer import Trainer


def at_step(monkeypatch, number, action):
    """Call `action(trainer, loss)` instead of the update at the `number`-th step from now on."""
    original, count = Trainer.update, iter(range(1, 10**6))

    def update(self, loss):
        return action(self, loss) if next(count) == number else original(self, loss)

    monkeypatch.setattr(Trainer, "update", update)


@dataclass
class TinyRun:
    """A tiny run with the data to itself."""

    arguments: list[str]
    folder: Path
    train_dir: Path
    script: str = "perpeft_lora_ia3"

    def train(self, *more):
        """Run the script in this process; returns all that it left."""
        run_script([*self.arguments, *more], import_module(self.script).main)
        return outcome(self.folder)

    def end(self, *more):
        """Run the script as a process would; returns the exit code and its stderr."""
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            return exit_code([*self.arguments, *more]), stderr.getvalue()

    def child(self, *more, **how):
        """Run the script in a child of the zygote, which says how."""
        return zygote.run([*self.arguments, *more], script=self.script, **how)

    def together(self, *more, size=2, **how):
        """Run the script in several processes that train together."""
        return zygote.run_together([*self.arguments, *more], script=self.script, size=size, **how)

    def child_to_the_end(self):
        """Run the script in a child that is not disturbed; returns all that it left, and the events that it consisted of."""
        end = self.child()
        assert end.code == 0, end.output
        assert not leftovers(self.folder) + leftovers(self.train_dir)
        return outcome(self.folder), end.events


def make_run(root, dataset, clip, kind="lora", **changes):
    """A tiny run that has not started, on a fresh copy of the data without what runs keep beside it."""
    data = fresh_data(dataset, root / "dataset")
    peft_type = None if kind == "iisan" else kind  # its script knows one kind only
    arguments = tiny_arguments(data, clip, root / "runs", **{"peft_type": peft_type, "save_every": 1, **changes})
    script, kinds = ("perpeft_iisan", ("iisan",)) if kind == "iisan" else ("perpeft_lora_ia3", PEFT_TYPES)
    return TinyRun(arguments, root / "runs" / run_name(parsed(arguments, kinds)), data.train_dir, script)


@pytest.fixture
def begin(tiny_dataset, tiny_clip, tmp_path):
    """`make_run`, in a folder of that name."""
    return lambda name="run", *kind, **changes: make_run(tmp_path / name, tiny_dataset, tiny_clip, *kind, **changes)


@pytest.fixture
def started(begin):
    """A run that was interrupted after its first epoch."""
    run = begin()
    run_interrupted(run.arguments)
    return run


@pytest.fixture
def finished(copied_run, tiny_dataset, tmp_path):
    """A finished run."""
    folder = fresh_data(tiny_dataset, tmp_path / "dataset").train_dir
    return TinyRun([*copied_run.arguments, "--train_dir", str(folder)], copied_run.folder, folder)


@pytest.fixture(scope="session")
def through(tiny_dataset, tiny_clip, tmp_path_factory):
    """A tiny run that was not disturbed: its outcome, and the events that it consists of."""
    left, events = make_run(tmp_path_factory.mktemp("through"), tiny_dataset, tiny_clip).child_to_the_end()
    return SimpleNamespace(outcome=left, events=events)
