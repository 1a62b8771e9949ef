"""Runs that have not started, and one that was not disturbed."""
from types import SimpleNamespace

import pytest

from tests.conftest import RUN, fresh_data, tiny_arguments
from tests.run_files import outcome
from utils.training.trainer import Trainer


def at_step(monkeypatch, number, action):
    """Call `action(trainer, loss)` instead of the update at the `number`-th step from now on."""
    original, count = Trainer.update, iter(range(1, 10**6))

    def update(self, loss):
        return action(self, loss) if next(count) == number else original(self, loss)

    monkeypatch.setattr(Trainer, "update", update)


@pytest.fixture
def begin(tiny_dataset, tiny_clip, tmp_path):
    """Make a fresh copy of the data, without what runs keep beside it, and return the arguments and the folder of a tiny run."""

    def make(name="run", kind="lora", **changes):
        data = fresh_data(tiny_dataset, tmp_path / name / "dataset")
        peft_type = None if kind == "iisan" else kind  # its script knows one kind only
        arguments = tiny_arguments(data, tiny_clip, tmp_path / name / "runs", peft_type, **{"save_every": 1, **changes})
        folder = tmp_path / name / "runs" / RUN.format(kind)
        return SimpleNamespace(arguments=arguments, folder=folder, train_dir=data.train_dir)

    return make


@pytest.fixture(scope="session")
def through(zygote, tiny_dataset, tiny_clip, tmp_path_factory):
    """A tiny run that was not disturbed: its outcome, and the events that it consists of."""
    folder = tmp_path_factory.mktemp("through")
    data = fresh_data(tiny_dataset, folder / "dataset")
    run = zygote.run(tiny_arguments(data, tiny_clip, folder / "runs", save_every=1))
    assert run.code == 0, run.output
    return SimpleNamespace(outcome=outcome(folder / "runs" / RUN.format("lora")), events=run.events)
