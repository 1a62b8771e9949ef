"""Nothing is lost: a run that is killed, interrupted or restarted at any moment ends as one that ran through."""
import collections
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock

from tests.conftest import exit_code, fresh_data, run_interrupted, run_script
from tests.run.conftest import at_step
from tests.run_files import change_json, leftovers, outcome, tree
from tests.zygote import read_until, start
from utils.common.errors import PerPEFTError
from utils.common.files import folder_written_atomically, remove_leftovers, write_atomically, write_text_atomically
from utils.run.distributed import stop_signals
from utils.run.finished import open_finished
from utils.run.run import Run
from utils.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_drawing")


# ---------------------------------------------------------------- killed


@pytest.mark.slow
def test_run_killed_at_any_moment_and_continued_ends_the_same(zygote, through, begin):
    """Every part of a run is killed once, at a moment drawn from a seeded generator, and six kills come at random times."""
    seeded = random.Random(0)
    moments = collections.Counter(label.split(":")[0] for label in through.events)  # part of the run: its events
    parts = list(moments)
    assert {"opening/store", "global/state", "global/evaluation", "grouping", "personalized/best weights", "report"} <= set(parts)
    kills = []
    num_runs = 8
    for number in range(num_runs):
        run = begin(f"run{number}")
        for part in parts[number::num_runs]:  # each run is killed in several of its parts, one after another
            moment = (part, seeded.randint(1, moments[part]))
            killed = zygote.run(run.arguments, kill_at=moment)
            if killed.code == 0:  # the kill before had left fewer events of this part: strike it in a run of its own
                assert outcome(run.folder) == through.outcome, kills
                run = begin(f"run{number}_{part.replace('/', '_').replace(' ', '_')}")
                killed = zygote.run(run.arguments, kill_at=moment)
            assert killed.code == -signal.SIGKILL, killed.output
            kills.append(killed.events[-1])
        end = zygote.run(run.arguments)
        assert end.code == 0, end.output
        assert outcome(run.folder) == through.outcome, kills
        assert not leftovers(run.folder) + leftovers(run.train_dir), kills
    run = begin("by_the_clock")
    for _ in range(6):
        killed = zygote.run(run.arguments, kill_after=seeded.uniform(0.05, 1.5))
        kills += killed.events[-1:] or ["before any event"]
    assert zygote.run(run.arguments).code == 0
    assert outcome(run.folder) == through.outcome, kills[-6:]


def test_kill_between_the_renames_that_replace_a_folder_loses_nothing(zygote, begin):
    for dropout in (0.3, 0.2, 0.1, 0.4, 0.5, 0.6):  # until a later epoch's best weights take the place of an earlier's
        changes = {"global_epochs": 4, "num_epochs": 1, "dropout_rate": dropout}
        expected = begin(f"expected_{dropout}", **changes)
        through = zygote.run(expected.arguments)
        events = [label for label in through.events if label.startswith("global/best weights")]
        if "global/best weights: after rename global" in events:
            break
    for label in ("before rename .global.tmp", "after rename global", "before rmtree .global.old"):
        last = max(number for number, event in enumerate(events, 1) if event.endswith(label))
        run = begin(label.replace(" ", "_"), **changes)
        assert zygote.run(run.arguments, kill_at=("global/best weights", last)).code == -signal.SIGKILL
        assert zygote.run(run.arguments).code == 0
        assert outcome(run.folder) == outcome(expected.folder) and not leftovers(run.folder)


def test_kill_while_restart_clears_leaves_nothing_that_is_refused_or_taken_up(zygote, begin):
    shorter = {"global_epochs": 1, "num_epochs": 1, "trial": 0}
    expected = begin("expected", **shorter)
    assert zygote.run(expected.arguments).code == 0
    run = begin("run")
    assert zygote.run(run.arguments).code == 0
    kept = shutil.copytree(run.folder, run.folder.with_name("kept"))
    other = [*begin("other", **shorter).arguments, "--output_dir", run.folder.parent]  # the same folder name, other settings
    restart = zygote.run([*other, "--restart"], kill_at=("opening/clearing", 10**6))
    assert restart.code == 0
    events = [label for label in restart.events if label.startswith("opening/clearing")]
    first = 1 + events.index("opening/clearing: after unlink summary.json")
    for number in sorted(random.Random(1).sample(range(first, len(events) + 1), 4)):
        shutil.rmtree(run.folder)
        shutil.copytree(kept, run.folder)
        assert zygote.run([*other, "--restart"], kill_at=("opening/clearing", number)).code == -signal.SIGKILL
        again = zygote.run(other)  # even without --restart: there is no old run any more
        assert again.code == 0 and "continuing" not in again.output, again.output
        assert outcome(run.folder) == outcome(expected.folder), events[number - 1]


def test_iisan_killed_while_hidden_states_are_saved_and_in_training_ends_the_same(zygote, begin):
    expected, run = (begin(name, "iisan", global_epochs=1, num_epochs=1) for name in ("expected", "run"))
    through = zygote.run(expected.arguments, script="perpeft_iisan")
    assert through.code == 0, through.output
    opening = [label for label in through.events if label.startswith("opening: ")]
    saving = ("opening", 1 + opening.index("opening: during save"))
    for kill_at in (saving, ("global/state", 3), ("personalized/best weights", 9)):
        assert zygote.run(run.arguments, script="perpeft_iisan", kill_at=kill_at).code == -signal.SIGKILL
    assert zygote.run(run.arguments, script="perpeft_iisan").code == 0
    assert outcome(run.folder) == outcome(expected.folder)
    assert not leftovers(run.folder) + leftovers(run.train_dir)


def test_restart_removes_only_what_runs_leave(copied_run):
    for name in ("mine", "tensorboard", "wandb", "figures"):
        (copied_run.folder / name).mkdir()
    (copied_run.folder / "note.txt").write_text("mine")
    run_script([*copied_run.arguments, "--restart", "--global_epochs", "1", "--num_epochs", "1"])
    names = {path.name for path in copied_run.folder.iterdir()}
    assert {"mine", "note.txt"} <= names and not names & {"tensorboard", "wandb", "figures", "resume"}
    assert len((copied_run.folder / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("epochs", [2, 4])  # the last one of either stage
def test_metrics_that_are_an_epoch_behind_the_state_are_written_again(begin, through, epochs):
    run = begin()
    run_interrupted(run.arguments, call=epochs)
    (run.folder / "curves.png").unlink()
    run_script(run.arguments)
    assert outcome(run.folder) == through.outcome


# ---------------------------------------------------------------- interrupted


@pytest.mark.slow
def test_script_stopped_by_sigterm_sigint_and_sigkill_says_how_to_go_on_and_ends_the_same(zygote, begin):
    expected, run = begin("expected", num_epochs=6), begin("run", num_epochs=6)
    assert zygote.run(expected.arguments).code == 0
    for number, moment in ((signal.SIGTERM, "global epoch 1"), (signal.SIGINT, "groups of"), (signal.SIGKILL, "continuing")):
        process = start("perpeft_lora_ia3.py", *run.arguments)
        read_until(process, moment)
        process.send_signal(number)
        output, _ = process.communicate(timeout=600)
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 128 + number and "Traceback" not in output
            assert f"interrupted by {number.name}" in output and f"{run.folder} is saved up to " in output
            assert "the same command continues from there" in output
    assert zygote.run(run.arguments).code == 0
    assert outcome(run.folder) == outcome(expected.folder)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGTERM, 3)])  # 3 is the last
def test_signal_in_a_step_saves_after_it_and_the_same_command_goes_on(begin, through, monkeypatch, capsys, number, step):
    def signalled(trainer, loss):
        os.kill(os.getpid(), number)
        update(trainer, loss)

    run, update = begin(save_every=500), Trainer.update
    at_step(monkeypatch, step, signalled)
    assert exit_code(run.arguments) == 128 + number
    assert f"is saved up to global epoch 1, step {step}; the same command continues" in capsys.readouterr().err
    monkeypatch.undo()
    run_script(run.arguments)
    assert outcome(run.folder) == through.outcome


def test_restart_is_left_out_of_the_advice_to_go_on(begin, monkeypatch, capsys):
    monkeypatch.setattr(Run, "_report_epoch", mock.Mock(side_effect=KeyboardInterrupt))
    assert exit_code([*begin().arguments, "--restart"]) == 130
    message = capsys.readouterr().err
    assert message.endswith("; the same command without --restart continues from there\n\ninterrupted by SIGINT\n")


def test_signal_after_the_last_step_was_checked_is_not_lost():
    with pytest.raises(KeyboardInterrupt) as interrupt, stop_signals(Accelerator(cpu=True), 1):
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupt.value.args == (signal.SIGTERM,)


def test_second_signal_stops_at_once_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    reached = []
    with pytest.raises(KeyboardInterrupt), stop_signals(Accelerator(cpu=True), 1) as requested:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested(1) == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append(True)
    assert not reached and signal.getsignal(signal.SIGTERM) == before


# ---------------------------------------------------------------- never mixed


@pytest.fixture
def started(begin):
    """A run that was interrupted after its first epoch."""
    run = begin()
    run_interrupted(run.arguments)
    return run


@pytest.fixture(params=["started", "finished"])
def kept(request, tiny_dataset, tmp_path):
    """A started or a finished run, with a copy of the data for itself."""
    if request.param == "started":
        return request.getfixturevalue("started")
    run, folder = request.getfixturevalue("copied_run"), fresh_data(tiny_dataset, tmp_path / "dataset").train_dir
    return SimpleNamespace(folder=run.folder, arguments=[*run.arguments, "--train_dir", str(folder)], train_dir=folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--num_epochs 3", "num_epochs was 2, is now 3"),
        ("--C 4", "C was 3, is now 4"),
        ("--dropout_rate 0.25 --maxlen 7", "dropout_rate was 0.3, is now 0.25; maxlen was 10, is now 7"),
        ("--missing_images blank", "missing_images was error, is now blank"),
        ("--lr 1.0000001e-3", "lr was 0.001, is now 0.0010000001"),  # another run under the same folder name
    ],
)
@pytest.mark.parametrize("more", [[], ["--inference_only"]])
def test_other_settings_are_refused_and_named(kept, change, message, more):
    before = outcome(kept.folder)
    with pytest.raises(PerPEFTError) as refusal:
        run_script([*kept.arguments, *change.split(), *more])
    assert message in str(refusal.value) and "--restart" in str(refusal.value)
    assert outcome(kept.folder) == before


def test_a_run_of_a_gpu_is_shown_and_evaluated_elsewhere_but_continued_there(started, copied_run, capsys):
    change_json(copied_run.folder / "summary.json", lambda summary: summary["config"].update(precision="fp16"))
    run_script(copied_run.arguments)
    run_script([*copied_run.arguments, "--inference_only"])
    assert capsys.readouterr().out.count("personalized    test") == 2
    change_json(started.folder / "resume" / "config.json", lambda config: config.update(precision="fp16"))
    with pytest.raises(PerPEFTError, match="started in fp16 on CUDA, not cpu; continue it there, or use --restart"):
        run_script(started.arguments)


def add_interaction(run, tiny_clip):
    path = run.train_dir / "tiny_final.txt"
    path.write_text(path.read_text() + "2 5\n")


def change_title(run, tiny_clip):
    path = run.train_dir / "tiny_texts_final.pickle"
    path.write_bytes(path.read_bytes().replace(b"number 1", b"number X", 1))


def change_image(run, tiny_clip):
    images = run.train_dir / "tiny_images"
    shutil.copy(images / "B002.jpg", images / "B003.jpg")


def change_clip(run, tiny_clip):
    path = tiny_clip / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_interaction, "dataset_fingerprint.*interactions or raw ids have changed"),
        (change_title, "contents_fingerprint.*titles or images"),
        (change_image, "contents_fingerprint.*titles or images"),
        (change_clip, "contents_fingerprint.*files of the foundation model"),
    ],
)
def test_changed_data_are_refused(kept, tiny_clip, change, message):
    weights = (tiny_clip / "model.safetensors").read_bytes()
    before = outcome(kept.folder)
    try:
        change(kept, tiny_clip)
        with pytest.raises(PerPEFTError, match=message):
            run_script(kept.arguments)
        if "summary.json" in before:
            with pytest.raises(PerPEFTError, match=message.split(".*")[1]):
                open_finished(kept.folder, "cpu", kept.train_dir)
    finally:
        (tiny_clip / "model.safetensors").write_bytes(weights)
    assert outcome(kept.folder) == before


def test_options_that_change_no_figure_may_change_on_the_way(started, through, tmp_path):
    moved = tmp_path / "moved"
    started.train_dir.rename(moved)
    run_script([*started.arguments, "--train_dir", str(moved), "--save_every", "7", "--debug"])
    assert outcome(started.folder) == through.outcome


def test_folder_without_a_saved_state_has_nothing_to_lose(begin, through):
    run = begin()
    (run.folder / "resume").mkdir(parents=True)
    (run.folder / "resume" / "config.json").write_text('{"lr": 7}')  # killed before the first save, with other settings
    (run.folder / "groups.csv").write_text("user,group\n1,0\n")
    run_script(run.arguments)
    assert outcome(run.folder) == through.outcome


def test_second_run_in_one_folder_is_refused(started, through):
    with FileLock(started.folder / ".lock"), pytest.raises(PerPEFTError, match="another process is training in"):
        run_script(started.arguments)
    run_script(started.arguments)
    assert outcome(started.folder) == through.outcome


@pytest.mark.parametrize("damage", ["cut off", "another shape", "no state"])
def test_damaged_state_is_reported_with_the_way_out(started, damage):
    path = started.folder / "resume" / "global.pt"
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        state = torch.load(path, weights_only=True)
        state["trainer"]["parameters"][0] = torch.zeros(3, 3)
        torch.save([1, 2] if damage == "no state" else state, path)
    with pytest.raises(PerPEFTError, match=r"global\.pt .*--restart"):
        run_script(started.arguments)


@pytest.mark.parametrize("content", ["", "[1]", "{", "null"])
def test_damaged_config_is_reported_with_the_way_out(started, content):
    (started.folder / "resume" / "config.json").write_text(content)
    with pytest.raises(PerPEFTError, match=r"config\.json is damaged.*--restart"):
        run_script(started.arguments)


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"config": 3}', '{"config": {"method": "none"}}'])
def test_damaged_summary_is_reported_with_the_way_out(copied_run, content):
    (copied_run.folder / "summary.json").write_text(content)
    with pytest.raises(PerPEFTError, match=r"summary\.json is damaged.*--restart"):
        run_script(copied_run.arguments)


# ---------------------------------------------------------------- whole or not at all


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_text_atomically(path, "old")

    def half(temporary):
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_atomically(path, half)
    assert tree(tmp_path) == {"file": b"old"}


def write_folder(folder, name):
    with folder_written_atomically(folder) as temporary:
        (temporary / name).write_text(name)
        if name == "bad":
            raise ZeroDivisionError


def test_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def rename_once(source, target):
        if Path(source).name == ".folder.tmp":  # between the renames
            raise OSError(5, "Input/output error")
        rename(source, target)

    write_folder(tmp_path / "folder", "old")
    with pytest.raises(ZeroDivisionError):
        write_folder(tmp_path / "folder", "bad")
    assert tree(tmp_path) == {"folder/old": b"old"}
    rename = os.rename
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(os, "rename", rename_once)
        write_folder(tmp_path / "folder", "new")
    assert tree(tmp_path) == {"folder/old": b"old"} and len(list(tmp_path.iterdir())) == 1
    write_folder(tmp_path / "folder", "new")
    assert tree(tmp_path) == {"folder/new": b"new"}


def test_leftovers_of_a_kill_are_removed_and_a_folder_that_stepped_aside_comes_back(tmp_path):
    for name in (".global.tmp", ".global.old", ".personalized.tmp", ".personalized.old", "personalized", ".other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / ".metrics.csv.tmp").write_text("half")
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {
        ".other/file": b".other", "global/file": b".global.old", "personalized/file": b"personalized"
    }  # fmt: skip
