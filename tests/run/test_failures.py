"""Every failure is reported in a sentence, with what was saved and what to do; then the same command has the same result."""
import collections
import errno
import math
import os
import random
import resource
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from models.clip_peft import ClipPeftEncoder
from models.peft_configs import peft_config
from tests.conftest import RUN, can_train, exit_code, fresh_data, run_interrupted, run_script, tiny_arguments
from tests.run.conftest import at_step
from tests.run_files import leftovers, outcome, summary_of
from utils.common.files import save_tensors
from utils.common.versions import installed_version
from utils.items.foundation import load_foundation
from utils.run import opening
from utils.training import progress as progress_module
from utils.training.checkpoints import save_adapter
from utils.training.evaluation import Ranks
from utils.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def run(begin):
    """A tiny run that has not started."""
    return begin()


@pytest.fixture
def end(capsys):
    """Run the script as a process would, up to its end; returns the exit code and its stderr."""

    def run_to_the_end(arguments, *more):
        capsys.readouterr()
        return exit_code([*arguments, *more]), capsys.readouterr().err

    return run_to_the_end


@pytest.fixture
def continued(run, end, through):
    """Check that the same command continues the run to the undisturbed end."""

    def check(*more):
        assert end(run.arguments, *more)[0] == 0
        assert outcome(run.folder) == through.outcome

    return check


# ---------------------------------------------------------------- disk


def check_reported_and_whole(end, folder):
    """A full disk was reported without a traceback, and no file is half-written."""
    assert end.code == 1, end.output
    assert "Traceback" not in end.output and "No space left on device: '" in end.output
    assert "Free some space on that disk" in end.output and f"{folder}" in end.output
    assert not leftovers(folder)
    for path in folder.rglob("*.pt*"):
        torch.load(path, weights_only=True)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here; the simulated failures stand in")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk_is_reported_and_the_run_goes_on_when_there_is_room(zygote, tiny_dataset, tiny_clip, small_disk, through):
    """One run meets a full disk again and again, with more room each time: first for the image store, then for the run."""
    data = fresh_data(tiny_dataset, small_disk / "dataset")
    arguments, ballast = tiny_arguments(data, tiny_clip, small_disk, save_every=1), small_disk / "ballast"
    full_at = []
    for room in (1_000, 50_000, 200_000, 500_000, 700_000):  # titles, images of 92 kB, states of both stages
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
        end = zygote.run(arguments)
        full_at.append(end.events[-1].split(":")[0])
        if end.code == 2:
            assert "the image store" in end.output and "No space left" in end.output and "make room" in end.output
            assert [path.name for path in (data.train_dir / "tiny_store").iterdir() if path.suffix != ".lock"] == []
        else:
            check_reported_and_whole(end, small_disk / RUN.format("lora"))
        ballast.unlink()
    assert {"opening/store", "global/state", "personalized/state"} <= set(full_at), full_at
    assert zygote.run(arguments).code == 0
    assert outcome(small_disk / RUN.format("lora")) == through.outcome


@pytest.mark.slow
def test_disk_that_is_full_at_any_write_is_reported_and_the_run_goes_on(zygote, through, begin):
    """Every part of a run that writes fails once, at a write drawn from a seeded generator."""
    writes, counts = {}, collections.Counter()
    for event in through.events:
        part, what = event.split(": ")
        counts[part] += 1
        if any(word in what for word in ("during save", "replace", "rename .", "mkdir adapter", "mkdir .")):
            writes.setdefault(part, []).append(counts[part])
    writes.pop("opening/store")  # which the next test fills the disk for
    assert writes.keys() >= {"global/state", "global/best weights", "personalized/draw_curves", "report/write_json"}
    seeded, num_runs = random.Random(0), 5
    for number in range(num_runs):
        run = begin(f"run{number}")
        for part in list(writes)[number::num_runs]:
            full_at = (part, seeded.choice(writes[part]))
            end = zygote.run(run.arguments, full_at=full_at)
            if end.code == 0:  # the failure before had left fewer events of this part: let it fail in a run of its own
                run = begin(f"run{number}_{part.replace('/', '_').replace(' ', '_')}")
                end = zygote.run(run.arguments, full_at=full_at)
            check_reported_and_whole(end, run.folder)
        assert zygote.run(run.arguments).code == 0
        assert outcome(run.folder) == through.outcome


def test_full_disk_while_the_store_is_built_leaves_no_half_of_it(zygote, through, run):
    events = [label for label in through.events if label.startswith("opening/store")]
    claim = 1 + events.index("opening/store: before posix_fallocate")
    end = zygote.run(run.arguments, full_at=("opening/store", claim))
    assert end.code == 2 and "Traceback" not in end.output
    assert "the image store" in end.output and "No space left" in end.output and "make room" in end.output
    assert [path.name for path in (run.train_dir / "tiny_store").iterdir() if path.suffix != ".lock"] == []


def test_failing_write_of_tensors_is_reported_as_the_oserror_it_is(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as on a full disk, a part of the file can be written
    try:
        with pytest.raises(OSError) as error:
            save_tensors({"weights": torch.zeros(10**6)}, tmp_path / "tensors.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG


def test_adapters_that_do_not_fit_on_the_disk_are_an_oserror(tiny_clip, tmp_path, monkeypatch):
    foundation = load_foundation(str(tiny_clip))
    encoder = ClipPeftEncoder(foundation.clip, peft_config("lora"), foundation.image_processor)
    monkeypatch.setattr(Path, "write_bytes", mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    with pytest.raises(OSError, match="No space left"):
        save_adapter(encoder, tmp_path, 0)


def test_folder_that_turns_read_only_is_reported(run, end, continued, monkeypatch):
    def replace(source, target):
        if next(count) == 12:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(target))
        return original(source, target)

    original, count = os.replace, iter(range(10**6))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        code, message = end(run.arguments)
    assert code == 1 and "Read-only file system" in message and "--output_dir" in message
    assert f"{run.folder} is saved up to global epoch " in message and "the same command continues from there" in message
    assert not leftovers(run.folder)
    continued()


def test_output_dir_that_is_a_file_is_reported(run, end, tmp_path):
    (tmp_path / "file").write_text("")
    for output_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        code, message = end(run.arguments, "--output_dir", str(output_dir))
        assert code == 2 and "--output_dir" in message and str(output_dir) in message


# ---------------------------------------------------------------- memory


def cuda_error(*_):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of 79 GiB")


def cublas_error(*_):
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize("fail", [lambda *_: torch.empty(2**60), lambda *_: np.empty(2**55), cuda_error, cublas_error])
def test_full_memory_is_reported_with_what_is_saved_and_what_to_try(run, end, continued, monkeypatch, fail):
    with monkeypatch.context() as patch:
        at_step(patch, 3, fail)
        code, message = end(run.arguments)
    assert code == 1 and message.count("\n") <= 5, message
    assert "memory is full" in message and "--gradient_checkpointing" in message and "--batch_size" in message
    assert f"{run.folder} is saved up to global epoch 1, step 2; the same command continues from there" in message
    if fail is cuda_error:  # the advice holds: the run goes on with the option, to the same end
        continued("--gradient_checkpointing")


def test_mistakes_in_the_code_end_with_a_traceback(run, end, monkeypatch):
    at_step(monkeypatch, 1, mock.Mock(side_effect=RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        end(run.arguments)


# ---------------------------------------------------------------- numbers


def spoil_loss(monkeypatch, number, value=float("nan")):
    """Make the loss of the `number`-th step from now on not finite; returns the list that its batch is put into."""
    original, count, batches = Trainer.loss, iter(range(1, 10**6)), []

    def loss(self, batch):
        if next(count) != number:
            return original(self, batch)
        batches.append(batch)
        return original(self, batch) * value

    monkeypatch.setattr(Trainer, "loss", loss)
    return batches


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("number", "place", "saved"), [(2, "global epoch 1, step 2", 1), (None, "personalized epoch 2, step 1", 0)]
)
def test_loss_that_is_not_finite_stops_with_step_group_and_items(
    run, end, through, continued, tiny_dataset, monkeypatch, value, number, place, saved
):
    if number is None:  # after two global epochs of 3 steps and a personalized one, whose steps depend on the groups
        users = [line.split(b",") for line in through.outcome["groups.csv"].split()[1:]]
        sizes = collections.Counter(group for user, group in users if can_train(tiny_dataset, int(user)))
        number = 7 + sum(math.ceil(size / 16) for size in sizes.values())
    with monkeypatch.context() as patch:
        batches = spoil_loss(patch, number, value)
        code, message = end(run.arguments)
    batch = batches[0]
    assert code == 2 and f"the loss is {value} at {place}, in a batch of group {batch.group} " in message
    assert ", ".join(map(str, batch.items[1:11])) in message and "--lr" in message
    assert f"saved up to {place.split(',')[0]}, step {saved}\n" in message  # where the same command would meet it again
    continued()


@pytest.mark.parametrize(("save_every", "saved"), [(1, 1), (2, None), (500, None)])
def test_where_losses_are_read_late_no_state_is_saved_after_a_bad_one(run, end, continued, monkeypatch, save_every, saved):
    with monkeypatch.context() as patch:
        patch.setattr(progress_module, "steps_between_reads", lambda device: 50)  # as on a GPU
        spoil_loss(patch, 2)
        code, message = end(run.arguments, "--save_every", str(save_every))
    assert code == 2 and "at global epoch 1, step 2, in a batch" in message
    state = run.folder / "resume" / "global.pt"
    assert state.is_file() == (saved is not None)
    if saved:
        assert torch.load(state, weights_only=True)["progress"]["step"] == saved
    continued()


@pytest.mark.parametrize("what", ["weights", "moments"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_after_a_finite_loss_are_never_saved(run, end, continued, monkeypatch, what, value):
    def spoil(trainer, loss):
        parameter = trainer.model.sasrec.item_emb.weight
        tensor = parameter.data if what == "weights" else trainer.optimizer.state[parameter]["exp_avg_sq"]
        tensor[3, 1] = value

    with monkeypatch.context() as patch:
        at_step(patch, 3, spoil)  # the last step of the epoch: no later loss would show it before the evaluation
        code, message = end(run.arguments)
    assert code == 2 and "infinite or NaN at global epoch 1, step 3, in a batch of group 0 with items " in message
    assert "saved up to global epoch 1, step 2" in message
    continued()


def test_metrics_that_are_not_finite_stop_the_run(run, end, continued, monkeypatch):
    original = Ranks.metrics
    with monkeypatch.context() as patch:
        patch.setattr(Ranks, "metrics", lambda self: {**original(self), "test_HR@10": float("nan")})
        code, message = end(run.arguments)
    assert code == 2 and "metrics of global epoch 1 are not finite" in message
    assert not (run.folder / "metrics.csv").exists() and not (run.folder / "global").exists()
    continued()


def scaled(monkeypatch, scale):
    """Let runs scale gradients as on CUDA with fp16; the largest float makes the first ones overflow."""
    if installed_version("torch") < (2, 3):
        pytest.skip("torch 2.2 scales gradients on CUDA alone")
    original = opening.make_accelerator

    def make_accelerator(*args):
        accelerator = original(*args)
        accelerator.scaler = torch.amp.grad_scaler.GradScaler("cpu", init_scale=scale)
        return accelerator

    monkeypatch.setattr(opening, "make_accelerator", make_accelerator)


def test_overflow_is_skipped_counted_and_shown_also_after_an_interruption(run, monkeypatch, capsys):
    def overflowing(trainer, loss):
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        update(trainer, loss)
        assert trainer.skipped_steps == 1 and all(map(torch.equal, before, trainer.model.parameters()))

    scaled(monkeypatch, 2.0**127)
    update = Trainer.update
    with monkeypatch.context() as patch:
        at_step(patch, 1, overflowing)
        run_interrupted(run.arguments, "evaluate")
    saved = torch.load(run.folder / "resume" / "global.pt", weights_only=True)["trainer"]["skipped_steps"]
    assert 1 <= saved <= 3
    run_script(run.arguments)
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps skipped" in line]
    shown = [int(line.split(" steps skipped")[0].split()[-1]) for line in lines]
    assert lines[0].startswith("global epoch 1/2") and shown[0] == saved
    skipped = summary_of(run.folder)["skipped_steps"]
    assert skipped["global"] <= 6 and skipped["personalized"] <= 8 and sum(shown) == sum(skipped.values())
    assert "skipped" not in (run.folder / "metrics.csv").read_text()


def test_state_saved_without_a_scaler_continues_with_one(run, monkeypatch):
    run_interrupted(run.arguments, "evaluate")
    scaled(monkeypatch, 2.0**16)
    run_script(run.arguments)
    assert (run.folder / "summary.json").is_file()


# ---------------------------------------------------------------- the user's mistakes


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "cuda:99", "cpu:5", "meta", "", "mps:1", "cuda:99999999999"])
def test_bad_device_is_named(run, end, device):
    code, message = end(run.arguments, f"--device={device}")
    assert code == 2 and f"--device {device}" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize(
    "mistake",
    ["--dataset=tinny", f"--dataset={'n' * 300}", "--clip_model=/nowhere/at/all", "--device=cuda:7", "--C=41"],
)
def test_mistakes_are_reported_in_a_sentence_and_shown_in_full_with_debug(zygote, run, mistake):
    plain = zygote.run([*run.arguments, mistake])
    assert plain.code in (1, 2) and "error: " in plain.output and "Traceback" not in plain.output
    shown = zygote.run([*run.arguments, mistake, "--debug"])
    assert shown.code == plain.code and "Traceback" in shown.output
    assert shown.output.splitlines()[-1] == plain.output.splitlines()[-1]
