"""--log_with: what TensorBoard's own reader and a stand-in for wandb find is what metrics.csv says, each epoch once."""
import os
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import RUN, run_interrupted
from tests.run_files import read_csv
from utils.common.errors import PerPEFTError


def metrics(folder):
    """What metrics.csv holds: (tag, step, value) of every epoch, sorted."""
    of_epochs = set(read_csv(folder / "metrics.csv")[0]) - {"stage", "epoch", "seconds"}
    rows = enumerate(read_csv(folder / "metrics.csv"), 1)
    return sorted((f"{row['stage']}/{name}", step, float(row[name])) for step, row in rows for name in of_epochs)


def scalars(run):
    """(tag, step, value) of all event files of a run."""
    found = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    return [(tag, event.step, event.value) for tag in found.Tags()["scalars"] for event in found.Scalars(tag)]


def assert_logged(found, run):
    """What was logged is what metrics.csv holds, each epoch once; and `seconds` and `skipped_steps`."""
    tags, steps, values = zip(*metrics(run.folder))
    found_tags, found_steps, found_values = zip(*sorted(entry for entry in found if entry[0] in tags))
    assert (found_tags, found_steps) == (tags, steps) and found_values == pytest.approx(values, rel=1e-6)
    assert {tag.split("/")[1] for tag, _, _ in found} - {tag.split("/")[1] for tag in tags} == {"seconds", "skipped_steps"}


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that notes every call, and of `init` the mode too."""
    package = mock.MagicMock(__spec__=SimpleNamespace(origin="wandb/__init__.py"), __version__="0.20.0", modes=[])
    package.init.side_effect = lambda **options: package.modes.append(os.environ["WANDB_MODE"]) or mock.DEFAULT
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    monkeypatch.setenv("WANDB_MODE", "")  # so that it is undone after the test
    monkeypatch.delenv("WANDB_MODE")
    return package


@pytest.mark.parametrize("reported", [True, False])  # whether the epoch's report is made before the interruption
def test_tensorboard_holds_every_epoch_once_after_an_interruption_too(begin, reported):
    run = begin(log_with="tensorboard")
    run_interrupted(run.arguments, call=3, after=reported)  # in the personalized stage
    assert {step for _, step, _ in scalars(run)} == ({1, 2, 3} if reported else {1, 2})
    run.train()
    assert_logged(scalars(run), run)
    settings = list((run.folder / "tensorboard").rglob("hparams.yml"))
    assert len(settings) == 1 and "\nlr: 0.001\n" in settings[0].read_text()
    assert not (run.folder / "resume").exists()


def test_logging_changes_no_figure_and_may_begin_on_the_way(begin, tiny_run):
    run = begin()
    run_interrupted(run.arguments, call=1, after=True)
    assert not (run.folder / "tensorboard").exists()
    run.train("--log_with", "tensorboard")
    assert metrics(run.folder) == metrics(tiny_run.folder)
    assert_logged(scalars(run), run)


def test_wandb_gets_settings_once_and_every_epoch_once_offline_or_in_the_users_mode(begin, wandb, monkeypatch):
    run = begin(log_with="wandb")
    run_interrupted(run.arguments, call=1, after=True)
    run.train()
    names = ["init", "config.update", "init().log", "init().finish", "init", *["init().log"] * 3, "init().finish"]
    assert [name for name, _, _ in wandb.mock_calls] == names and wandb.modes == ["offline"] * 2
    (_, first), (_, second) = wandb.init.call_args_list
    expected = {"project": "perpeft", "name": RUN.format("lora"), "dir": str(run.folder), "resume": "allow"}
    assert first == second and first.items() > expected.items()
    assert wandb.config.update.call_args.args[0].items() > {"lr": 1e-3, "C": 3}.items()
    logged = wandb.init.return_value.log.call_args_list
    assert_logged([(tag, call.kwargs["step"], value) for call in logged for tag, value in call.args[0].items()], run)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run.train("--restart")
    assert wandb.modes[2:] == ["disabled"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_package_that_is_not_installed_is_reported_before_anything_is_done(begin, monkeypatch, tmp_path, name):
    (tmp_path / "elsewhere" / name).mkdir(parents=True)  # a folder of its name is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere")])
    monkeypatch.delitem(sys.modules, name, raising=False)
    run = begin(log_with=name)
    with pytest.raises(PerPEFTError, match=f"--log_with {name} needs .* not installed: pip install {name}$"):
        run.train()
    assert not run.folder.parent.exists()
