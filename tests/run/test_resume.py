"""Nothing is lost: a run that is killed, interrupted or restarted at any moment ends as one that ran through."""
import collections
import io
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock

from tests.run_files import change_json, outcome, tree
from tests.zygote import read_until, start
from utils.common.errors import PerPEFTError
from utils.common.files import folder_written_atomically, remove_leftovers, write_atomically
from utils.run.distributed import stop_signals
from utils.run.finished import open_finished

pytestmark = pytest.mark.usefixtures("no_drawing")
RENAMES = ("before rename .global.tmp", "after rename global", "before rmtree .global.old")  # which replace a folder


@pytest.mark.slow
def test_run_killed_at_any_moment_and_continued_ends_the_same(through, begin, strike):
    """Every part of a run is killed once, at a moment drawn from a seeded generator, and six kills come at random times."""
    seeded = random.Random(0)
    parts = collections.Counter(label.split(":")[0] for label in through.events)  # part of the run: its events
    assert {"opening/store", "global/state", "global/evaluation", "grouping", "personalized/best weights", "report"} <= set(parts)
    for _, killed in strike("kill_at", [(part, seeded.randint(1, number)) for part, number in parts.items()], num_runs=8):
        assert killed.code == -signal.SIGKILL, killed.output
    run = begin("by_the_clock")
    kills = [run.child(kill_after=seeded.uniform(0.05, 1.5)).events[-1:] for _ in range(6)]
    assert run.child_to_the_end()[0] == through.outcome, kills


@pytest.mark.parametrize(
    ("kind", "changes", "part", "labels"),
    [
        # a rate at which the best weights of a later epoch take the place of an earlier one's
        ("lora", {"lr": 3e-3, "trial": 1, "global_epochs": 8}, "global/best weights", RENAMES),
        ("iisan", {"global_epochs": 1}, "opening", ["during save"]),  # of the hidden states
        ("iisan", {"global_epochs": 1}, "personalized/best weights", ["during save"]),
    ],
)
def test_run_killed_at_the_worst_moments_ends_the_same(begin, kind, changes, part, labels):
    expected, events = begin("expected", kind, num_epochs=1, **changes).child_to_the_end()
    events = [label for label in events if label.startswith(f"{part}: ")]
    for label in labels:
        last = max(number for number, event in enumerate(events, 1) if event.endswith(label))
        run = begin(label.replace(" ", "_"), kind, num_epochs=1, **changes)
        assert run.child(kill_at=(part, last)).code == -signal.SIGKILL
        assert run.child_to_the_end()[0] == expected


def test_kill_while_restart_clears_leaves_nothing_that_is_refused_or_taken_up(begin):
    shorter = {"global_epochs": 1, "num_epochs": 1, "trial": 0}
    expected, _ = begin("expected", **shorter).child_to_the_end()
    run, other = begin("run"), begin("other", **shorter)
    run.child_to_the_end()
    kept = shutil.copytree(run.folder, run.folder.with_name("kept"))
    other.arguments += ["--output_dir", run.folder.parent]  # the same folder name, other settings
    events = [label for label in other.child("--restart").events if label.startswith("opening/clearing")]
    first = 1 + events.index("opening/clearing: after unlink summary.json")
    for number in sorted(random.Random(1).sample(range(first, len(events) + 1), 4)):
        shutil.rmtree(run.folder)
        shutil.copytree(kept, run.folder)
        killed = other.child("--restart", kill_at=("opening/clearing", number))
        again = other.child()  # even without --restart: there is no old run any more
        assert (killed.code, again.code) == (-signal.SIGKILL, 0) and "continuing" not in again.output, again.output
        assert outcome(run.folder) == expected, events[number - 1]


@pytest.mark.slow
def test_script_stopped_by_sigterm_and_sigint_says_how_to_go_on_and_ends_the_same(begin):
    expected, run = begin("expected", num_epochs=6), begin("run", num_epochs=6)
    for number, moment in ((signal.SIGTERM, "global epoch 1"), (signal.SIGINT, "groups of")):
        process = start("perpeft_lora_ia3.py", *run.arguments)
        read_until(process, moment)
        process.send_signal(number)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 128 + number and "Traceback" not in output
        assert f"interrupted by {number.name}" in output and f"{run.folder} is saved up to " in output
        assert "the same command continues from there" in output
    assert run.child_to_the_end()[0] == expected.child_to_the_end()[0]


def test_first_signal_says_that_a_second_one_stops_at_once_and_handlers_are_restored(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_signals(Accelerator(cpu=True), 1) as requested:
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested(1) == signal.SIGTERM and "a second signal stops at once\n" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the second signal did not stop at once")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.fixture(params=["started", "finished"])
def kept(request, tiny_run):  # tiny_run, so that it is made before anything is patched
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


def test_folder_without_a_saved_state_has_nothing_to_lose(begin, through):
    run = begin()
    (run.folder / "resume").mkdir(parents=True)
    (run.folder / "resume" / "config.json").write_text('{"lr": 7}')  # killed before the first save, with other settings
    (run.folder / "groups.csv").write_text("user,group\n1,0\n")
    assert run.train() == through.outcome


def test_second_run_in_one_folder_is_refused_and_options_that_change_no_figure_may_change(started, through, tmp_path):
    with FileLock(started.folder / ".lock"), pytest.raises(PerPEFTError, match="another process is training in"):
        started.train()
    moved = started.train_dir.rename(tmp_path / "moved")
    assert started.train("--train_dir", str(moved), "--save_every", "7", "--debug") == through.outcome


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
        ("started", "resume/tensorboard.json", b'{"id": 7}'),
        *(("started", "resume/config.json", text) for text in (b"", b"[1]", b"{", b"null")),
        *(("finished", "summary.json", text)
          for text in (b"", b"[1]", b"{}", b'{"config": 3}', b'{"config": {"method": "none"}}')),
        ("finished", "groups.csv", lambda content: content[: content[:-1].rindex(b"\n")]),  # a user less
        ("finished", "groups.csv", lambda content: content[:-2] + b"7\n"),  # a group too high
        ("finished", "groups.csv", b""),
        ("finished", "groups.csv", None),  # missing
        ("finished", "global/sasrec.pth", None),
    ],
)
def test_damaged_file_is_reported_with_the_way_out(request, tiny_run, which, file, damage):
    run = request.getfixturevalue(which)
    path = run.folder / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)
    with pytest.raises(PerPEFTError, match=f"{path.name} .*--restart"):
        run.train(*(["--inference_only"] if which == "finished" else ["--log_with", "tensorboard"]))


def write_file(path, content):
    def write(temporary):
        temporary.write_text(content)
        if content == "bad":
            raise OSError(28, "No space left on device")

    write_atomically(path, write)


def write_folder(path, content):
    with folder_written_atomically(path) as temporary:
        write_file(temporary / "file", content)


@pytest.mark.parametrize(("write", "name"), [(write_file, "target"), (write_folder, "target/file")])
def test_target_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, write, name):
    def fail_once(source, target, rename=os.rename):
        if Path(source).name == ".target.tmp":  # of a folder, between its two renames
            raise OSError(5, "Input/output error", str(tmp_path / "target"))
        rename(source, target)

    write(tmp_path / "target", "old")
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/"):
        write(tmp_path / "target", "bad")
    assert tree(tmp_path) == {name: b"old"}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        for function in ("rename", "replace"):
            patch.setattr(os, function, fail_once)
        write(tmp_path / "target", "new")
    assert tree(tmp_path) == {name: b"old"} and len(list(tmp_path.iterdir())) == 1
    write(tmp_path / "target", "new")
    assert tree(tmp_path) == {name: b"new"}


def test_folder_takes_the_place_of_a_file_and_leaves_nothing_in_the_way_of_the_next(tmp_path):
    (tmp_path / "target").write_text("a file")
    for content in ("old", "new"):
        write_folder(tmp_path / "target", content)
    assert tree(tmp_path) == {"target/file": b"new"}


def test_leftovers_of_a_kill_are_removed_and_a_folder_that_stepped_aside_comes_back(tmp_path):
    for name in (".global.tmp", ".global.old", ".personalized.tmp", ".personalized.old", "personalized", ".other"):
        write_folder(tmp_path / name, name)
    (tmp_path / ".metrics.csv.tmp").write_text("half")
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {".other/file": b".other", "global/file": b".global.old", "personalized/file": b"personalized"}
