"""Runs that have not started, one that was interrupted, and one that was not disturbed."""
import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.peft_configs import PEFT_TYPES
from tests.conftest import RUN, exit_code, fresh_data, parsed, run_interrupted, run_script, tiny_arguments
from tests.run_files import outcome
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

    def train(self, *more):
        """Run the script in this process; returns all that it left."""
        run_script([*self.arguments, *more])
        return outcome(self.folder)

    def end(self, *more):
        """Run the script as a process would; returns the exit code and its stderr."""
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            return exit_code([*self.arguments, *more]), stderr.getvalue()


@pytest.fixture
def begin(tiny_dataset, tiny_clip, tmp_path):
    """Make a fresh copy of the data, without what runs keep beside it, in a folder of a tiny run that has not started."""

    def make(name="run", kind="lora", root=None, **changes):
        root = root or tmp_path / name
        data = fresh_data(tiny_dataset, root / "dataset")
        peft_type = None if kind == "iisan" else kind  # its script knows one kind only
        arguments = tiny_arguments(data, tiny_clip, root / "runs", peft_type, **{"save_every": 1, **changes})
        name_of_run = run_name(parsed(arguments, ("iisan",) if kind == "iisan" else PEFT_TYPES))
        return TinyRun(arguments, root / "runs" / name_of_run, data.train_dir)

    return make


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
def through(zygote, tiny_dataset, tiny_clip, tmp_path_factory):
    """A tiny run that was not disturbed: its outcome, and the events that it consists of."""
    folder = tmp_path_factory.mktemp("through")
    data = fresh_data(tiny_dataset, folder / "dataset")
    run = zygote.run(tiny_arguments(data, tiny_clip, folder / "runs", save_every=1))
    assert run.code == 0, run.output
    return SimpleNamespace(outcome=outcome(folder / "runs" / RUN.format("lora")), events=run.events)
