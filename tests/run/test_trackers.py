"""--log_with: what TensorBoard's own reader and a stand-in for wandb find is what metrics.csv says, each epoch once."""
import json
import sys

import pytest
from accelerate import tracking
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import RUN, run_interrupted, run_script, tiny_arguments
from tests.run_files import read_csv
from utils.common.errors import PerPEFTError
from utils.run import tracking as own_tracking

RUN = RUN.format("lora")
# Written beside the test, so that importing and calling it go the real way; every call is a line of a file.
WANDB = """
import json, os, pathlib

class _Config:
    def update(self, values, allow_val_change=False):
        _note(["config", values])

config = _Config()
__version__ = "0.20.0"

def _note(call):
    with open(os.environ["WANDB_CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")

class _Run:
    def log(self, values, step=None):
        _note(["log", step, values])

    def finish(self):
        _note(["finish"])

def init(**options):
    (pathlib.Path(options["dir"]) / "wandb").mkdir(exist_ok=True)
    _note(["init", options, os.environ["WANDB_MODE"]])
    return _Run()
"""


@pytest.fixture
def arguments(tiny_dataset, tiny_clip, tmp_path):
    return lambda log_with, **changes: tiny_arguments(tiny_dataset, tiny_clip, tmp_path, log_with=log_with, **changes)


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


def scalars(folder):
    """{tag: [(step, value)]} of all event files directly in a folder."""
    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def assert_logged(found, folder):
    """The series hold what metrics.csv does."""
    for tag, series in metrics(folder).items():
        assert found[tag] == [(step, pytest.approx(value, rel=1e-6)) for step, value in series], tag


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """Put the stand-in where it is imported from; returns a function that reads its calls."""
    place = tmp_path / "packages"
    place.mkdir()
    (place / "wandb.py").write_text(WANDB)
    (place / "wandb-0.20.0.dist-info").mkdir()
    (place / "wandb-0.20.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: wandb\nVersion: 0.20.0\n")
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD, LoggerType.WANDB])
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("WANDB_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("WANDB_MODE", "")  # so that it is undone after the test
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    sys.modules.pop("wandb", None)


def test_tensorboard_holds_every_epoch_once_after_an_interruption_too(arguments, tmp_path):
    folder = tmp_path / RUN
    run_interrupted(arguments("tensorboard"), call=3, after=True)  # in the personalized stage
    assert len({step for series in scalars(folder / "tensorboard").values() for step, _ in series}) == 3
    run_script(arguments("tensorboard"))
    found = scalars(folder / "tensorboard")
    assert [step for step, _ in found["personalized/train_loss"]] == [3, 4]
    assert_logged(found, folder)
    assert len(found["global/seconds"]) == 2
    settings = list((folder / "tensorboard").rglob("hparams.yml"))
    assert len(settings) == 1 and "\nlr: 0.001\n" in settings[0].read_text()
    assert not (folder / "resume").exists()


def test_epoch_whose_report_was_missed_is_logged_by_the_continuation(arguments, tmp_path):
    run_interrupted(arguments("tensorboard"))
    run_script(arguments("tensorboard"))
    assert_logged(scalars(tmp_path / RUN / "tensorboard"), tmp_path / RUN)


def test_logging_changes_no_figure_and_may_begin_on_the_way(arguments, tiny_run, tmp_path):
    run_interrupted(arguments("none"), call=1, after=True)
    assert not (tmp_path / RUN / "tensorboard").exists()
    run_script(arguments("tensorboard"))
    assert metrics(tmp_path / RUN) == metrics(tiny_run.folder)
    assert_logged(scalars(tmp_path / RUN / "tensorboard"), tmp_path / RUN)


def test_wandb_gets_settings_once_and_every_epoch_once_offline(arguments, wandb, tmp_path):
    run_interrupted(arguments("wandb"), call=1, after=True)
    assert [call[0] for call in wandb()] == ["init", "config", "log", "finish"]
    run_script(arguments("wandb"))
    all_calls = wandb()
    assert [call[0] for call in all_calls[4:]] == ["init", "log", "log", "log", "finish"]
    (_, first, mode), (_, second, _) = (call for call in all_calls if call[0] == "init")
    assert mode == "offline" and first == second and first["resume"] == "allow" and first["project"] == "perpeft"
    assert first["name"] == RUN and first["dir"] == str(tmp_path / RUN) and (tmp_path / RUN / "wandb").is_dir()
    assert all_calls[1][1]["lr"] == 1e-3 and all_calls[1][1]["C"] == 3
    assert_logged(series_of(call[1:] for call in all_calls if call[0] == "log"), tmp_path / RUN)


def test_wandb_mode_of_the_user_is_kept(arguments, monkeypatch, wandb):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run_script(arguments("wandb", global_epochs=1, method="none", num_epochs=1))
    assert wandb()[0][2] == "disabled"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_package_that_is_not_installed_is_reported_before_anything_is_done(arguments, monkeypatch, tmp_path, name):
    monkeypatch.setattr(own_tracking.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PerPEFTError, match=f"--log_with {name} needs .* not installed: pip install {name}$"):
        run_script(arguments(name))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_packages_name_is_no_package(arguments, monkeypatch, tmp_path):
    (tmp_path / "elsewhere" / "wandb").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(PerPEFTError, match="--log_with wandb needs .* not installed"):
        run_script(arguments("wandb"))


def test_damaged_note_is_reported_with_the_way_out(arguments, tmp_path):
    run_interrupted(arguments("tensorboard"), call=1, after=True)
    (tmp_path / RUN / "resume" / "tensorboard.json").write_text("{")
    with pytest.raises(PerPEFTError, match=r"tensorboard\.json is damaged .*--restart"):
        run_script(arguments("tensorboard"))
