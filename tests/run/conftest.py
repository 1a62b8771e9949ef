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
        """Run the script in a fork, see `tests.zygote.run`."""
        return self.together(*more, size=None, **how)[0]

    def together(self, *more, size=2, **how):
        """Run the script in several forks that train together."""
        return zygote.run([*self.arguments, *more], self.script, size, **how)

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


@pytest.fixture
def strike(begin, through):
    """Kills or fails runs at moments, each run at several of them; yields every end, and lets them go on to the same outcome."""

    def ends(how, moments, num_runs):
        for number in range(num_runs):
            run = begin(f"run{number}")
            for moment in moments[number::num_runs]:
                end = run.child(**{how: moment})
                if end.code == 0:  # the moment before had left fewer events of this part: take a run of its own
                    assert outcome(run.folder) == through.outcome
                    run = begin(f"run{number}_{moment[0].replace('/', '_').replace(' ', '_')}")
                    end = run.child(**{how: moment})
                print(end.events[-1])
                yield run, end
            assert run.child_to_the_end()[0] == through.outcome

    return ends
