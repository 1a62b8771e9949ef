"""Every failure is reported in a sentence, with what was saved and what to do; then the same command has the same result."""
import collections
import errno
import math
import os
import random
import re
import resource
import signal
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch

from models.clip_peft import ClipPeftEncoder
from models.peft_configs import peft_config
from tests.conftest import at_call, can_train, run_interrupted
from tests.run_files import leftovers, summary_of
from utils.common.files import save_tensors
from utils.common.versions import installed_version
from utils.items.foundation import load_foundation
from utils.run import opening
from utils.run.run import Run
from utils.training.checkpoints import save_adapter
from utils.training.progress import READ_INTERVALS
from utils.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_drawing")


@pytest.mark.slow
def test_disk_that_is_full_at_any_write_is_reported_and_the_run_goes_on(through, strike):
    """Every part of a run that writes fails once, at a write drawn from a seeded generator; the store, where it claims room."""
    writes, counts = collections.defaultdict(list), collections.Counter()
    for event in through.events:
        part, what = event.split(": ")
        counts[part] += 1
        of_a_run = ("during save", "replace", "rename .", "mkdir .")
        if any(word in what for word in (("before posix_fallocate",) if part == "opening/store" else of_a_run)):
            writes[part].append(counts[part])
    assert {"opening/store", "global/state", "global/best weights", "personalized/draw_curves", "report/write_json"} <= {*writes}
    seeded = random.Random(0)
    for run, end in strike("full_at", [(part, seeded.choice(numbers)) for part, numbers in writes.items()], num_runs=5):
        assert "Traceback" not in end.output and "No space left" in end.output
        if end.code == 2:
            assert "the image store" in end.output and "make room" in end.output
            assert {path.suffix for path in (run.train_dir / "tiny_store").iterdir()} <= {".lock"}
            continue
        assert end.code == 1 and "Free some space on that disk" in end.output
        assert "No space left on device: '" in end.output and str(run.folder) in end.output
        assert not leftovers(run.folder)
        for path in run.folder.rglob("*.pt*"):
            torch.load(path, weights_only=True)


def test_failing_write_is_the_oserror_it_is(tiny_clip, tmp_path):
    foundation = load_foundation(str(tiny_clip))
    encoder = ClipPeftEncoder(foundation.clip, peft_config("lora"), foundation.image_processor)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # as on a full disk, a part of the file can be written
    try:
        with pytest.raises(OSError) as of_adapter:
            save_adapter(encoder, tmp_path, 0)
        with pytest.raises(OSError) as of_tensors:
            save_tensors({"weights": torch.zeros(10**6)}, tmp_path / "tensors.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert of_adapter.value.errno == of_tensors.value.errno == errno.EFBIG


def spoil_loss(monkeypatch, number, value=math.nan):
    """Make the loss of the `number`-th step from now on not finite; returns the list that its batch is put into."""
    original, batches = Trainer.loss, []

    def loss(trainer, batch):
        batches.append(batch)
        return original(trainer, batch) * value

    at_call(monkeypatch, Trainer, "loss", number, loss)
    return batches


def spoil(name, value, trainer, loss):
    """A step that spoils a weight, or what AdamW keeps of it."""
    parameter = trainer.model.sasrec.item_emb.weight
    (parameter.data if name == "weight" else trainer.optimizer.state[parameter][name])[3, 1] = value


def signalled(number, trainer, loss, update=Trainer.update):
    """A step in which the process gets a signal."""
    os.kill(os.getpid(), number)
    update(trainer, loss)


def at(step, action, *given):
    return lambda monkeypatch: at_call(monkeypatch, Trainer, "update", step, partial(action, *given))


def at_report(number, action):
    """In place of the report of an epoch, which the continuation catches up on."""
    return lambda monkeypatch: at_call(monkeypatch, Run, "_report_epoch", number, action)


class Doomed:
    """Sends a signal in its destructor, where Python ignores what is raised."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


def turn_read_only(monkeypatch):
    error = OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(os, "replace", mock.Mock(wraps=os.replace, side_effect=[*[mock.DEFAULT] * 12, error]))


CUDA = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of 79 GiB")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
STOP = mock.Mock(side_effect=KeyboardInterrupt)
GO_ON = "; the same command continues from there\n"
RESTARTED = "; the same command without --restart continues from there\n"
MEMORY = ("memory is full", "--gradient_checkpointing", "--batch_size", f" epoch 1, step 2{GO_ON}")
LOSS = ("at global epoch 1, step 2, in a batch of group 0 with items ", "--lr", " epoch 1, step 1\n")
WEIGHTS = ("infinite or NaN at global epoch 1, step 3, in a batch of group 0 with items ", " epoch 1, step 2\n")


@pytest.mark.parametrize(
    ("trouble", "code", "sentences"),
    [
        (at(3, lambda *_: torch.empty(2**60)), 1, MEMORY),
        (at(3, lambda *_: np.empty(2**55)), 1, MEMORY),
        (at(3, mock.Mock(side_effect=CUBLAS)), 1, MEMORY),
        (at(3, mock.Mock(side_effect=CUDA)), 1, MEMORY),
        (lambda patch: spoil_loss(patch, 2, math.nan), 2, ("the loss is nan", *LOSS)),
        (lambda patch: spoil_loss(patch, 2, math.inf), 2, ("the loss is inf", *LOSS)),
        (at(3, spoil, "weight", math.nan), 2, WEIGHTS),  # the last step of the epoch: no later loss would show it in time
        (at(3, spoil, "weight", -math.inf), 2, WEIGHTS),
        (at(3, spoil, "exp_avg_sq", math.nan), 2, WEIGHTS),
        (at(3, spoil, "exp_avg_sq", -math.inf), 2, WEIGHTS),
        (turn_read_only, 1, ("Read-only file system", "--output_dir", GO_ON)),
        (at(1, signalled, signal.SIGTERM), 143, ("by SIGTERM", f" epoch 1, step 1{GO_ON}")),
        (at(2, signalled, signal.SIGINT), 130, ("by SIGINT", f" epoch 1, step 2{RESTARTED}")),
        (at(3, signalled, signal.SIGTERM), 143, ("by SIGTERM", f" epoch 1, step 3{GO_ON}")),
        (at_report(1, lambda *_: Doomed()), 143, ("by SIGTERM", f" global epoch 2, step 0{GO_ON}")),
        (at_report(2, lambda *_: Doomed()), 143, ("by SIGTERM", f" global epoch 3, step 0{GO_ON}")),  # the stage's end
        (at_report(2, STOP), 130, ("by SIGINT", f" global epoch 3, step 0{RESTARTED}")),
        (at_report(4, STOP), 130, ("by SIGINT", f" personalized epoch 3, step 0{RESTARTED}")),
    ],
)
def test_trouble_is_reported_with_what_is_saved_and_the_run_goes_on(begin, through, monkeypatch, trouble, code, sentences):
    run = begin(save_every=500 if code > 128 else 1)  # a signal lets the state be saved
    with monkeypatch.context() as patch:
        trouble(patch)
        found, message = run.end(*(["--restart"] if code == 130 else []))
    assert found == code and message.count("\n") <= 5
    assert [part for part in (*sentences, f"{run.folder} is saved up to ") if part not in message] == []
    assert not leftovers(run.folder)
    # the advice holds: the run goes on with the option, to the same end
    assert run.train(*(["--gradient_checkpointing"] if "memory" in message else [])) == through.outcome


def test_mistakes_in_the_code_end_with_a_traceback(begin, monkeypatch):
    at_call(monkeypatch, Trainer, "update", 1, mock.Mock(side_effect=RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        begin().end()


def test_loss_that_is_not_finite_in_stage_3_stops_with_step_group_and_items(begin, through, tiny_dataset, monkeypatch):
    users = [line.split(b",") for line in through.outcome["groups.csv"].split()[1:]]
    sizes = collections.Counter(group for user, group in users if can_train(tiny_dataset, int(user)))
    steps = sum(math.ceil(size / 16) for size in sizes.values())  # of an epoch, after two global ones of 3 steps
    run = begin()
    with monkeypatch.context() as patch:
        batches = spoil_loss(patch, 6 + steps + 1)
        code, message = run.end()
    (batch,) = batches
    assert code == 2 and f"the loss is nan at personalized epoch 2, step 1, in a batch of group {batch.group} " in message
    assert ", ".join(map(str, batch.items[1:11])) in message and "--lr" in message
    assert "saved up to personalized epoch 2, step 0\n" in message  # where the same command would meet it again
    assert run.train() == through.outcome


@pytest.mark.parametrize(("save_every", "saved"), [(1, True), (2, False), (500, False)])
def test_where_losses_are_read_late_no_state_is_saved_after_a_bad_one(begin, through, monkeypatch, save_every, saved):
    run = begin(save_every=save_every)
    with monkeypatch.context() as patch:
        patch.setitem(READ_INTERVALS, "cpu", 50)  # as on a GPU
        spoil_loss(patch, 2)
        code, message = run.end()
    assert code == 2 and "at global epoch 1, step 2, in a batch" in message
    assert ("saved up to global epoch 1, step 1\n" in message) == (run.folder / "resume" / "global.pt").is_file() == saved
    assert run.train() == through.outcome


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


def test_overflow_is_skipped_counted_and_shown_also_after_an_interruption(begin, monkeypatch, capsys):
    scaled(monkeypatch, 2.0**127)
    run = begin()
    run_interrupted(run.arguments, "evaluate")  # a step that was not skipped would have left NaN, which stops the run
    saved = torch.load(run.folder / "resume" / "global.pt", weights_only=True)["trainer"]["skipped_steps"]
    assert 1 <= saved <= 3
    run.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps skipped" in line]
    shown = [int(line.split(" steps skipped")[0].split()[-1]) for line in lines]
    assert lines[0].startswith("global epoch 1/2") and shown[0] == saved
    skipped = summary_of(run.folder)["skipped_steps"]
    assert skipped["global"] <= 6 and skipped["personalized"] <= 8 and sum(shown) == sum(skipped.values())
    assert "skipped" not in (run.folder / "metrics.csv").read_text()


def test_state_saved_without_a_scaler_continues_with_one(started, monkeypatch):
    scaled(monkeypatch, 2.0**16)
    assert "summary.json" in started.train()


DEVICES = ("gpu", "cuda:x", "cuda:-1", "cuda:99", "cpu:5", "meta", "", "mps:1", "cuda:99999999999")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        *((f"--device={device}", f"error: --device {device}") for device in DEVICES),
        *((f"--output_dir={path}", f"error: cannot make the run folder {path}/") for path in (__file__, f"{__file__}/below")),
        ("--dataset=tinny", "error: data set 'tinny' is not in "),
        (f"--dataset={'n' * 300}", r"error: \[Errno 36\] File name too long: "),
        ("--clip_model=/nowhere/at/all", "error: --clip_model '/nowhere/at/all' cannot be loaded"),
        ("--C=41", "41 groups"),
        ("--precision=fp16", "error: --precision fp16 needs a CUDA device, not cpu; use --precision bf16 or fp32"),
        ("--dataset=sports_outdoors --device=cuda:0 --lr=1e-4", "sports_outdoors_final.txt is missing .* python3 unzip_data.py"),
    ],
)
def test_mistakes_are_reported_in_a_sentence_and_shown_in_full_with_debug(begin, mistake, message):
    run = begin()
    code, said = run.end(*mistake.split())
    sentence = said.splitlines()[-1]
    assert code in (1, 2) and re.search(message, sentence) and "Traceback" not in said
    assert not run.folder.parent.exists() or "clip_model" in mistake  # nothing is made before the data are found sound
    code_again, shown = run.end(*mistake.split(), "--debug")
    assert code_again == code and "Traceback" in shown and shown.splitlines()[-1] == sentence
