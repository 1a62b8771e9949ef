"""Several processes that train together leave what one leaves: the same losses, figures and files, whatever stops them."""
import copy
import csv
import os
import shutil
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock

from models import IISAN, ClipPeftEncoder, FrozenEncoder, IISANEncoder, MMProjector, NoProjector, PerPEFT, SASRec
from models.clip_peft import ia3_config
from tests.conftest import NUM_ITEMS, tiny_arguments
from tests.zygote import ROOT, shared_zygote
from utils.common.devices import seed_everything
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.data.histories import Histories, leave_last_out
from utils.items.foundation import load_foundation
from utils.training.evaluation import encode_all_items, rank_all_users
from utils.training.parallel import ParallelTrainer
from utils.training.processes import Processes, joined_processes
from utils.training.sampling import Sampler
from utils.training.trainer import Trainer

CPU = torch.device("cpu")
RUN = "tiny_{}_lr0.001_wd0.0001_seed0"
NO_DROPOUT = {"dropout_rate": 0, "batch_size": 7, "save_every": 4}  # an odd batch: the parts differ in size


# ---------------------------------------------------------------- parts of a batch, in one process


class Ledger(Processes):
    """Stands in for one of several processes: notes what it would send, and takes up a sum that was made elsewhere."""

    def __init__(self, rank, size, total=None):
        super().__init__(CPU, rank, size)
        self.sent = None
        self._total = total

    def sum_(self, tensor):
        self.sent = tensor.clone()
        return tensor if self._total is None else self._total.clone()


def example_sampler(batch_size):
    random = np.random.default_rng(2)
    histories = Histories.of_lists([random.integers(1, NUM_ITEMS + 1, size=n).tolist() for n in (5, 2, 7, 3, 9, 4, 6)])
    groups = np.ones(7, dtype=np.int64)  # all users in the second group
    candidates = [np.arange(1, NUM_ITEMS + 1)] * 2
    return Sampler(histories, NUM_ITEMS, groups, candidates, batch_size, maxlen=4, seed=(0,))


def users_of(batch):
    """What a batch asks of each user, in items' own numbers."""
    return [batch.items[table].tolist() for table in (batch.seq, batch.positives, batch.negatives)]


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_parts_of_a_batch_hold_every_user_once_and_their_own_items_only(size):
    batch = example_sampler(7).batch(1, 0)
    parts = [batch.part(rank, size) for rank in range(size)]
    whole = list(zip(*users_of(batch)))
    assert len(whole) == 7
    for rank, part in enumerate(parts):
        assert part.group == 1 and part.whole is batch
        assert list(zip(*users_of(part))) == whole[rank::size]
        used = {item for table in users_of(part) for row in table for item in row}
        assert part.items.tolist() == sorted(used | {0})  # the padding item in row 0
        assert part.seq.shape == part.positives.shape == part.negatives.shape == (len(whole[rank::size]), 4)


def iisan_example(dtype=torch.float64):
    encoder = IISANEncoder(IISAN(image_dim=6, text_dim=5, num_states=3, bottleneck=2))
    states = torch.randn(NUM_ITEMS, 3, 6, dtype=dtype), torch.randn(NUM_ITEMS, 3, 5, dtype=dtype)
    return encoder, MMProjector(encoder.feature_dim, 8), lambda items: tuple(table[items - 1] for table in states)


def no_features_example():
    return FrozenEncoder(0), NoProjector(0, 8), lambda items: (torch.empty(len(items), 0, dtype=torch.float64),)


@pytest.fixture
def ia3_example(tiny_dataset, tiny_clip):
    def make():
        foundation = load_foundation(str(tiny_clip))
        store = foundation.store(read_dataset(tiny_dataset.train_dir, "tiny"))
        encoder = ClipPeftEncoder(foundation.clip, ia3_config(), foundation.image_processor)
        return encoder, MMProjector(encoder.feature_dim, 8), lambda items: store.fetch(items, CPU)

    return make


def gradients(model):
    return {
        name: None if parameter.grad is None else parameter.grad.to_dense().double()
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize("size", [2, 3, 9])
@pytest.mark.parametrize("kind", ["ia3", "iisan", "none"])
def test_gradients_of_the_parts_add_up_to_the_whole_batchs(ia3_example, size, kind):
    """Of 7 users; with 9 processes two have none. Every other group's adapter and projector keep no gradient at all."""
    torch.manual_seed(3)
    encoder, projector, fetch = {"ia3": ia3_example, "iisan": iisan_example, "none": no_features_example}[kind]()
    model = PerPEFT(encoder, projector, SASRec(NUM_ITEMS, 8, 4, 1, 2, dropout_rate=0.0))
    if kind != "ia3":  # CLIP's attention mask knows no double precision
        model.double()
    model.clone_groups(2)
    batch = example_sampler(7).batch(1, 0)
    plain = copy.deepcopy(model)
    loss = Trainer(plain, 1e-3, 0.1, 0.01, CPU).loss(batch, fetch(batch.items[1:]))
    loss.backward()
    expected = gradients(plain)

    def step(rank, total=None):
        ours, ledger = copy.deepcopy(model), Ledger(rank, size, total)
        trainer = ParallelTrainer(ours, 1e-3, 0.1, 0.01, CPU, ledger)
        part = trainer.part(batch)
        return trainer.loss(part, fetch(part.items[1:])), gradients(ours), ledger.sent

    total = sum(step(rank)[-1] for rank in range(size))
    for rank in (0, size - 1):
        found_loss, found, _ = step(rank, total)
        assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
        for name, gradient in expected.items():
            if gradient is None:
                assert found[name] is None, name
            else:
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("size", [2, 3, 40])
def test_evaluation_that_is_shared_gives_every_vector_and_rank(tiny_dataset, tiny_clip, ia3_example, size):
    """Shares, added, are one process's result; 30 items in chunks of 7 are 5, fewer than 40 processes."""
    torch.manual_seed(4)
    encoder, projector, _ = ia3_example()
    model = PerPEFT(encoder, projector, SASRec(NUM_ITEMS, 8, 4, 1, 2)).eval()
    model.clone_groups(2)
    dataset = read_dataset(tiny_dataset.train_dir, "tiny")
    store, split = load_foundation(str(tiny_clip)).store(dataset), leave_last_out(dataset.histories)
    groups = np.arange(dataset.num_users) % 2
    whole = encode_all_items(model, 1, store, CPU, items_at_once=7)
    shares = [encode_all_items(model, 1, store, CPU, 7, processes=Processes(CPU, rank, size)) for rank in range(size)]
    torch.testing.assert_close(sum(shares), whole, rtol=0, atol=1e-6)
    expected = rank_all_users(model, split, groups, lambda group: whole)
    shared = [rank_all_users(model, split, groups, lambda group: whole, Processes(CPU, rank, size)) for rank in range(size)]
    for name in ("valid", "test"):
        assert sum(ranks[name] for ranks in shared).tolist() == expected[name].tolist()


def test_without_a_launcher_there_are_no_processes_to_join(monkeypatch):
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    with joined_processes("cpu") as processes:
        assert type(processes) is Processes and (processes.rank, processes.size) == (0, 1) and processes.is_first
        value = torch.ones(2)
        assert processes.sum_(value) is value and processes.gather(3) == [3] and processes.first(lambda: 4) == 4


def test_every_process_draws_dropout_of_its_own_and_the_first_as_if_it_were_alone():
    torch.manual_seed(13)
    draws = [torch.rand(4)]
    for rank in range(3):
        seed_everything(13, rank)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(draw.tolist()) for draw in draws}) == 3


@pytest.mark.parametrize(("device", "gpus", "told"), [("cuda:1", 2, "a GPU of its own"), ("mps", 0, "a GPU of its own"),
                                                      (None, 1, "2 processes were started on 1 GPUs")])  # fmt: skip
def test_device_that_several_processes_cannot_have_is_refused(monkeypatch, device, gpus, told):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    with pytest.raises(PerPEFTError, match=told), joined_processes(device):
        pass


# ---------------------------------------------------------------- runs


@pytest.fixture
def begin(tiny_dataset, tiny_clip, tmp_path):
    """A fresh copy of the data, without store and hidden states, and the arguments of a run on it."""

    def make(name, peft_type="ia3", **changes):
        data = SimpleNamespace(name="tiny", train_dir=tmp_path / name / "dataset")
        shutil.copytree(tiny_dataset.train_dir, data.train_dir, ignore=shutil.ignore_patterns("tiny_store", "*preX*"))
        arguments = tiny_arguments(data, tiny_clip, tmp_path / name / "runs", peft_type, **{**NO_DROPOUT, **changes})
        if peft_type == "iisan":
            place = arguments.index("--peft_type")
            del arguments[place : place + 2]
        return SimpleNamespace(arguments=arguments, folder=tmp_path / name / "runs" / RUN.format(peft_type))

    return make


def metrics(run):
    with (run.folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_figures(run, expected):
    """Equal but for the order in which numbers were added, which may let one user of 38 change places with another item."""
    assert len(metrics(run)) == len(metrics(expected)) == 4
    for row, other in zip(metrics(run), metrics(expected)):
        assert (row.pop("stage"), row.pop("epoch")) == (other.pop("stage"), other.pop("epoch"))
        loss, other_loss = (float(values.pop("train_loss")) for values in (row, other))
        assert loss == pytest.approx(other_loss, rel=1e-3)
        for name, value in row.items():
            assert float(value) == pytest.approx(float(other[name]), abs=0.03), name
    assert (run.folder / "groups.csv").read_text() == (expected.folder / "groups.csv").read_text()


def files(run):
    return sorted(path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file())


def test_two_processes_give_one_processs_losses_figures_and_files_also_when_stopped_and_continued(begin):
    zygote = shared_zygote()
    expected, run = begin("expected"), begin("run")
    (alone,) = zygote.run_together(expected.arguments, size=1)
    assert alone.code == 0, alone.output
    assert len(alone.losses) >= 20
    first, second = zygote.run_together(run.arguments, signal_at=(1, 9))  # one of them alone; 9 is no step of --save_every 4
    assert first.code == second.code == 128 + signal.SIGTERM, first.output + second.output
    assert "interrupted by SIGTERM" in first.output and "step 3; the same command continues" in first.output
    assert second.output == ""
    by_one = SimpleNamespace(folder=run.folder.parent.parent / "by_one" / run.folder.name)
    shutil.copytree(run.folder, by_one.folder)
    first_again, second_again = zygote.run_together(run.arguments)
    assert first_again.code == second_again.code == 0, first_again.output
    assert "dropout is drawn differently" not in first_again.output
    assert first.losses == second.losses and first_again.losses == second_again.losses
    losses = first.losses + first_again.losses
    assert len(first.losses) == 9 and len(losses) == len(alone.losses)
    assert losses[:20] == pytest.approx(alone.losses[:20], rel=1e-4)
    assert_same_figures(run, expected)
    assert files(run) == files(expected)
    assert second_again.output == "" and first_again.output.count("personalized epoch 2/2") == 1

    arguments = list(run.arguments)
    arguments[arguments.index("--output_dir") + 1] = str(by_one.folder.parent)
    (one,) = zygote.run_together(arguments, size=1)
    assert one.code == 0 and one.output.count("number of processes: 2 before, 1 now; dropout is drawn differently") == 1
    assert_same_figures(by_one, expected)


def test_three_processes_with_dropout_stop_and_go_on_exactly(begin):
    """Every process has its own masks, which are kept; so the same number of them goes on as if nothing had been."""
    zygote = shared_zygote()
    expected, run = (begin(name, dropout_rate=0.3, global_epochs=1, num_epochs=1) for name in ("expected", "run"))
    through = zygote.run_together(expected.arguments, size=3)
    assert [end.code for end in through] == [0, 0, 0], through[0].output
    stopped = zygote.run_together(run.arguments, size=3, signal_at=(0, 4))
    assert [end.code for end in stopped] == [143, 143, 143], stopped[0].output
    ended = zygote.run_together(run.arguments, size=3)
    assert [end.code for end in ended] == [0, 0, 0], ended[0].output
    assert stopped[0].losses + ended[0].losses == pytest.approx(through[0].losses, rel=1e-6)
    assert metrics(run) == metrics(expected)


def launch(script, arguments, **options):
    """`accelerate launch` of two processes on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, script, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )


@pytest.mark.slow
def test_accelerate_launch_of_iisan_stopped_by_sigterm_and_continued_gives_one_processs_figures(begin):
    zygote = shared_zygote()
    expected, run = begin("expected", "iisan"), begin("run", "iisan")
    (alone,) = zygote.run_together(expected.arguments, script="perpeft_iisan", size=1)
    assert alone.code == 0, alone.output
    launched = launch("perpeft_iisan.py", run.arguments)
    for line in launched.stdout:
        if "global epoch 1/2" in line:
            launched.send_signal(signal.SIGTERM)
            break
    output, _ = launched.communicate(timeout=100)
    assert launched.returncode != 0
    assert output.count("interrupted by SIGTERM") == 1 and "the same command continues from there" in output, output
    first, second = zygote.run_together(run.arguments, script="perpeft_iisan")
    assert first.code == second.code == 0, first.output
    assert "continuing" in first.output
    assert_same_figures(run, expected)
    assert files(run) == files(expected)


def test_users_mistake_is_told_once_and_ends_the_launcher(begin):
    run = begin("run", clip_model="/nowhere")
    launched = launch("perpeft_lora_ia3.py", run.arguments)
    output, _ = launched.communicate(timeout=100)
    assert launched.returncode != 0
    assert output.count("CLIP weights '/nowhere' cannot be loaded") == 1, output
    assert "process 1: " not in output


def test_error_that_the_first_process_alone_meets_ends_the_others(begin):
    run = begin("run")
    run.folder.mkdir(parents=True)
    with FileLock(run.folder / ".lock"):
        first, second = shared_zygote().run_together(run.arguments)
    assert first.code == 2 and first.output.count("another process is training in") == 1
    assert second.code == 1 and second.output.startswith("process 1: error: the first process has met an error")
    assert files(run) == [".lock"]
