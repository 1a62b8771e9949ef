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


def series_of(logged):
    """{tag: [(step, value)]} from pairs of a step and its values by tag."""
    series = {}
    for step, values in logged:
        for tag, value in values.items():
            series.setdefault(tag, []).append((step, float(value)))
    return series


def metrics(folder):
    """The series that metrics.csv holds."""
    rows = enumerate(read_csv(folder / "metrics.csv"), 1)
    return series_of(
        (step, {f"{row['stage']}/{name}": row[name] for name in set(row) - {"stage", "epoch", "seconds"}}) for step, row in rows
    )


def scalars(run):
    """{tag: [(step, value)]} of all event files of a run."""
    found = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def assert_logged(found, run):
    """The series hold what metrics.csv does."""
    for tag, series in metrics(run.folder).items():
        assert found[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in series], tag


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


def test_tensorboard_holds_every_epoch_once_after_an_interruption_too(begin):
    run = begin(log_with="tensorboard")
    run_interrupted(run.arguments, call=3, after=True)  # in the personalized stage
    assert len({step for series in scalars(run).values() for step, _ in series}) == 3
    run.train()
    found = scalars(run)
    assert [step for step, _ in found["personalized/train_loss"]] == [3, 4]
    assert_logged(found, run)
    assert len(found["global/seconds"]) == 2
    settings = list((run.folder / "tensorboard").rglob("hparams.yml"))
    assert len(settings) == 1 and "\nlr: 0.001\n" in settings[0].read_text()
    assert not (run.folder / "resume").exists()


def test_epoch_whose_report_was_missed_is_logged_by_the_continuation(begin):
    run = begin(log_with="tensorboard")
    run_interrupted(run.arguments)
    run.train()
    assert_logged(scalars(run), run)


def test_logging_changes_no_figure_and_may_begin_on_the_way(begin, tiny_run):
    run = begin()
    run_interrupted(run.arguments, call=1, after=True)
    assert not (run.folder / "tensorboard").exists()
    run.train("--log_with", "tensorboard")
    assert metrics(run.folder) == metrics(tiny_run.folder)
    assert_logged(scalars(run), run)


def test_wandb_gets_settings_once_and_every_epoch_once_offline(begin, wandb):
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
    assert_logged(series_of((call.kwargs["step"], call.args[0]) for call in logged), run)


def test_wandb_mode_of_the_user_is_kept(begin, monkeypatch, wandb):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    begin(log_with="wandb", global_epochs=1, method="none", num_epochs=1).train()
    assert wandb.modes == ["disabled"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_package_that_is_not_installed_is_reported_before_anything_is_done(begin, monkeypatch, tmp_path, name):
    (tmp_path / "elsewhere" / name).mkdir(parents=True)  # a folder of its name is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere")])
    monkeypatch.delitem(sys.modules, name, raising=False)
    run = begin(log_with=name)
    with pytest.raises(PerPEFTError, match=f"--log_with {name} needs .* not installed: pip install {name}$"):
        run.train()
    assert not run.folder.parent.exists()


def test_damaged_note_is_reported_with_the_way_out(begin):
    run = begin(log_with="tensorboard")
    run_interrupted(run.arguments, call=1, after=True)
    (run.folder / "resume" / "tensorboard.json").write_text("{")
    with pytest.raises(PerPEFTError, match=r"tensorboard\.json is damaged .*--restart"):
        run.train()
