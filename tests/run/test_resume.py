"""Nothing is lost: a run that is killed, interrupted or restarted at any moment ends as one that ran through."""
import collections
import io
import os
import random
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock

from tests.conftest import run_interrupted
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


@pytest.fixture
def through_to(zygote):
    """Run to the end in a child; returns what the run left, without leftovers, and its end."""

    def run_through(run, **how):
        end = zygote.run(run.arguments, **how)
        assert end.code == 0, end.output
        assert not leftovers(run.folder) + leftovers(run.train_dir)
        return outcome(run.folder), end

    return run_through


@pytest.mark.slow
def test_run_killed_at_any_moment_and_continued_ends_the_same(zygote, through_to, through, begin):
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
        assert through_to(run)[0] == through.outcome, kills
    run = begin("by_the_clock")
    for _ in range(6):
        killed = zygote.run(run.arguments, kill_after=seeded.uniform(0.05, 1.5))
        kills += killed.events[-1:] or ["before any event"]
    assert through_to(run)[0] == through.outcome, kills[-6:]


def test_kill_between_the_renames_that_replace_a_folder_loses_nothing(zygote, through_to, begin):
    changes = {"lr": 3e-3, "trial": 1, "global_epochs": 8, "num_epochs": 1}  # so that a later epoch is better than an earlier one
    expected, end = through_to(begin("expected", **changes))
    events = [label for label in end.events if label.startswith("global/best weights")]
    for label in ("before rename .global.tmp", "after rename global", "before rmtree .global.old"):
        last = max(number for number, event in enumerate(events, 1) if event.endswith(label))
        run = begin(label.replace(" ", "_"), **changes)
        assert zygote.run(run.arguments, kill_at=("global/best weights", last)).code == -signal.SIGKILL
        assert through_to(run)[0] == expected


def test_kill_while_restart_clears_leaves_nothing_that_is_refused_or_taken_up(zygote, through_to, begin):
    shorter = {"global_epochs": 1, "num_epochs": 1, "trial": 0}
    expected, _ = through_to(begin("expected", **shorter))
    run, other = begin("run"), begin("other", **shorter)
    through_to(run)
    kept = shutil.copytree(run.folder, run.folder.with_name("kept"))
    other.arguments += ["--output_dir", run.folder.parent]  # the same folder name, other settings
    restart = zygote.run([*other.arguments, "--restart"])
    events = [label for label in restart.events if label.startswith("opening/clearing")]
    first = 1 + events.index("opening/clearing: after unlink summary.json")
    for number in sorted(random.Random(1).sample(range(first, len(events) + 1), 4)):
        shutil.rmtree(run.folder)
        shutil.copytree(kept, run.folder)
        killed = zygote.run([*other.arguments, "--restart"], kill_at=("opening/clearing", number))
        again = zygote.run(other.arguments)  # even without --restart: there is no old run any more
        assert (killed.code, again.code) == (-signal.SIGKILL, 0) and "continuing" not in again.output, again.output
        assert outcome(run.folder) == expected, events[number - 1]


def test_iisan_killed_while_hidden_states_are_saved_and_in_training_ends_the_same(zygote, through_to, begin):
    expected, run = (begin(name, "iisan", global_epochs=1, num_epochs=1) for name in ("expected", "run"))
    left, end = through_to(expected, script="perpeft_iisan")
    opening = [label for label in end.events if label.startswith("opening: ")]
    saving = ("opening", 1 + opening.index("opening: during save"))
    for kill_at in (saving, ("global/state", 3), ("personalized/best weights", 9)):
        assert zygote.run(run.arguments, script="perpeft_iisan", kill_at=kill_at).code == -signal.SIGKILL
    assert through_to(run, script="perpeft_iisan")[0] == left


def test_restart_removes_only_what_runs_leave(finished):
    for name in ("mine", "tensorboard", "wandb", "figures"):
        (finished.folder / name).mkdir()
    (finished.folder / "note.txt").write_text("mine")
    finished.train("--restart", "--global_epochs", "1", "--num_epochs", "1")
    names = {path.name for path in finished.folder.iterdir()}
    assert {"mine", "note.txt"} <= names and not names & {"tensorboard", "wandb", "figures", "resume"}
    assert len((finished.folder / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("epochs", [2, 4])  # the last one of either stage
def test_metrics_that_are_an_epoch_behind_the_state_are_written_again(begin, through, epochs):
    run = begin()
    run_interrupted(run.arguments, call=epochs)
    (run.folder / "curves.png").unlink()
    assert run.train() == through.outcome


# ---------------------------------------------------------------- interrupted


@pytest.mark.slow
def test_script_stopped_by_sigterm_sigint_and_sigkill_says_how_to_go_on_and_ends_the_same(through_to, begin):
    expected, run = begin("expected", num_epochs=6), begin("run", num_epochs=6)
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
    assert through_to(run)[0] == through_to(expected)[0]


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGTERM, 3)])  # 3 is the last
def test_signal_in_a_step_saves_after_it_and_the_same_command_goes_on(begin, through, monkeypatch, number, step):
    def signalled(trainer, loss):
        os.kill(os.getpid(), number)
        update(trainer, loss)

    run, update = begin(save_every=500), Trainer.update
    at_step(monkeypatch, step, signalled)
    code, message = run.end()
    assert code == 128 + number and f"is saved up to global epoch 1, step {step}; the same command continues" in message
    monkeypatch.undo()
    assert run.train() == through.outcome


@pytest.mark.parametrize(("epoch", "place"), [(1, "global epoch 2, step 1;"), (2, "global epoch 3, step 0;")])  # 2 is the last
def test_signal_between_epochs_is_obeyed_even_if_it_comes_in_a_destructor(begin, through, monkeypatch, epoch, place):
    class Doomed:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)  # Python ignores what is raised here

    def report(run, stage, epochs):
        original(run, stage, epochs)
        if next(count) == epoch:
            Doomed()

    run, original, count = begin(save_every=500), Run._report_epoch, iter(range(1, 10**6))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_report_epoch", report)
        code, message = run.end()
    assert code == 128 + signal.SIGTERM and f"is saved up to {place}" in message
    assert run.train() == through.outcome


def test_restart_is_left_out_of_the_advice_to_go_on(begin, monkeypatch):
    monkeypatch.setattr(Run, "_report_epoch", mock.Mock(side_effect=KeyboardInterrupt))
    code, message = begin().end("--restart")
    assert code == 130
    assert message.endswith("; the same command without --restart continues from there\n\ninterrupted by SIGINT\n")


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


@pytest.fixture(params=["started", "finished"])
def kept(request):
    """A started or a finished run."""
    return request.getfixturevalue(request.param)


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
    with pytest.raises(PerPEFTError, match=f"{message}.*--restart"):
        kept.train(*change.split(), *more)
    assert outcome(kept.folder) == before


def test_a_run_of_a_gpu_is_shown_and_evaluated_elsewhere_but_continued_there(started, finished, capsys):
    change_json(finished.folder / "summary.json", lambda summary: summary["config"].update(precision="fp16"))
    finished.train()
    finished.train("--inference_only")
    assert capsys.readouterr().out.count("personalized    test") == 2
    change_json(started.folder / "resume" / "config.json", lambda config: config.update(precision="fp16"))
    with pytest.raises(PerPEFTError, match="started in fp16 on CUDA, not cpu; continue it there, or use --restart"):
        started.train()


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("tiny_final.txt", b"\n", b"\n2 5\n", "dataset_fingerprint.*interactions or raw ids have changed"),
        ("tiny_texts_final.pickle", b"number 1", b"number X", "contents_fingerprint.*titles or images"),
        ("tiny_images/B003.jpg", b"\xff\xd9", b"\xff\xd9.", "contents_fingerprint.*titles or images"),
        ("model.safetensors", b"F32", b"F16", "contents_fingerprint.*files of the foundation model"),
    ],
)
def test_changed_data_are_refused(kept, tiny_clip, file, old, new, message):
    path = (tiny_clip if file == "model.safetensors" else kept.train_dir) / file
    content, before = path.read_bytes(), outcome(kept.folder)
    try:
        path.write_bytes(content.replace(old, new, 1))
        with pytest.raises(PerPEFTError, match=message):
            kept.train()
        if "summary.json" in before:
            with pytest.raises(PerPEFTError, match=message.split(".*")[1]):
                open_finished(kept.folder, "cpu", kept.train_dir)
    finally:
        path.write_bytes(content)
    assert outcome(kept.folder) == before


def test_options_that_change_no_figure_may_change_on_the_way(started, through, tmp_path):
    moved = tmp_path / "moved"
    started.train_dir.rename(moved)
    assert started.train("--train_dir", str(moved), "--save_every", "7", "--debug") == through.outcome


def test_folder_without_a_saved_state_has_nothing_to_lose(begin, through):
    run = begin()
    (run.folder / "resume").mkdir(parents=True)
    (run.folder / "resume" / "config.json").write_text('{"lr": 7}')  # killed before the first save, with other settings
    (run.folder / "groups.csv").write_text("user,group\n1,0\n")
    assert run.train() == through.outcome


def test_second_run_in_one_folder_is_refused(started, through):
    with FileLock(started.folder / ".lock"), pytest.raises(PerPEFTError, match="another process is training in"):
        started.train()
    assert started.train() == through.outcome


def saved(value):
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def another_shape(content):
    state = torch.load(io.BytesIO(content), weights_only=True)
    state["trainer"]["parameters"][0] = torch.zeros(3, 3)
    return saved(state)


@pytest.mark.parametrize(
    ("which", "file", "damage"),
    [
        ("started", "resume/global.pt", lambda content: content[:1000]),
        ("started", "resume/global.pt", another_shape),
        ("started", "resume/global.pt", saved([1, 2])),
        *(("started", "resume/config.json", text) for text in (b"", b"[1]", b"{", b"null")),
        *(("finished", "summary.json", text)
          for text in (b"", b"[1]", b"{}", b'{"config": 3}', b'{"config": {"method": "none"}}')),
        ("finished", "groups.csv", lambda content: content[: content[:-1].rindex(b"\n")]),  # a user less
        ("finished", "groups.csv", lambda content: content[:-2] + b"7\n"),  # a group too high
        ("finished", "groups.csv", b""),
        ("finished", "groups.csv", None),  # missing
    ],
)
def test_damaged_file_is_reported_with_the_way_out(request, which, file, damage):
    run = request.getfixturevalue(which)
    path = run.folder / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)
    with pytest.raises(PerPEFTError, match=f"{path.name} .*--restart"):
        run.train(*(["--inference_only"] if which == "finished" else []))


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
