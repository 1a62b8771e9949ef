"""Several processes that train together leave what one leaves: the same losses, metrics and files, however they are stopped."""
import os
import shutil
import signal
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from filelock import FileLock

from tests.conftest import NUM_ITEMS
from tests.run_files import groups_of, tree, without_seconds
from tests.zygote import free_port, read_until, start
from utils.common.devices import choose_device, seed_everything
from utils.common.errors import PerPEFTError
from utils.data.histories import Histories
from utils.run.distributed import make_accelerator
from utils.training.sampling import Sampler


def users_of(batch):
    """Each user's history, positives and negatives, as item numbers."""
    return list(zip(*(batch.items[table].tolist() for table in (batch.seq, batch.positives, batch.negatives))))


def test_runs_in_two_precisions_fit_into_one_process():
    AcceleratorState._reset_state()
    Accelerator(cpu=True, mixed_precision="bf16")
    assert make_accelerator("cpu").mixed_precision == "no"


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_shards_of_a_batch_hold_every_user_once_and_their_own_items_only(size):
    random = np.random.default_rng(2)
    histories = Histories.of_lists([random.integers(1, NUM_ITEMS + 1, size=n).tolist() for n in (5, 2, 7, 3, 9, 4, 6)])
    groups, candidates = np.ones(7, dtype=np.int64), [np.arange(1, NUM_ITEMS + 1)] * 2  # all users in the second group
    batch = Sampler(histories, NUM_ITEMS, groups, candidates, 7, maxlen=4, seed=(0,)).batch(1, 0)
    full = users_of(batch)
    assert len(full) == 7 and batch.num_transitions == (batch.seq > 0).sum()
    for rank in range(size):
        shard = batch.shard(rank, size)
        assert shard.group == 1 and shard.num_transitions == batch.num_transitions
        if rank >= 7:  # no user is left: one item is encoded, and nothing is learned from it
            assert len(shard.items) == 2 and not shard.seq.any() and shard.seq.shape == (1, 4)
            continue
        assert users_of(shard) == full[rank::size]
        used = {item for user in users_of(shard) for row in user for item in row}
        assert shard.items.tolist() == sorted(used | {0})  # the padding item in row 0


def test_every_rank_draws_dropout_of_its_own_and_rank_0_as_if_it_were_alone():
    torch.manual_seed(13)
    draws = [torch.rand(4)]
    for rank in range(3):
        seed_everything(13, rank)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(draw.tolist()) for draw in draws}) == 3


@pytest.mark.parametrize(("device", "gpus", "message"), [("cuda:1", 2, "a GPU of its own"), ("mps", 0, "a GPU of its own"),
                                                         (None, 1, "2 processes were started on 1 GPUs")])  # fmt: skip
def test_device_that_several_processes_cannot_have_is_refused(monkeypatch, device, gpus, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    with pytest.raises(PerPEFTError, match=message):
        choose_device(device)


@pytest.fixture
def deterministic(begin):
    """An expected run and a run, both without dropout; an odd batch, so that shards differ in size."""
    same = {"dropout_rate": 0, "batch_size": 7, "save_every": 4}
    return lambda kind="ia3", **changes: [begin(name, kind, **(same | changes)) for name in ("expected", "run")]


def assert_same_figures(run, expected):
    """Equal but for the order in which numbers were added, which may let one user of 38 change places with another item."""
    rows, others = without_seconds(run.folder), without_seconds(expected.folder)
    assert len(rows) == len(others) == 4
    for row, other in zip(rows, others):
        assert row.pop("stage") == other.pop("stage")
        assert float(row.pop("train_loss")) == pytest.approx(float(other.pop("train_loss")), rel=1e-3)
        assert list(map(float, row.values())) == pytest.approx(list(map(float, other.values())), abs=0.03)
    assert tree(run.folder).keys() == tree(expected.folder).keys()
    if (run.folder / "groups.csv").exists():
        assert groups_of(run.folder) == groups_of(expected.folder)


def mean_losses(*ranks):
    """The loss of each step, which is the mean of those of the ranks' shards."""
    return np.mean([rank.losses for rank in ranks], axis=0).tolist()


def test_two_processes_have_one_processs_losses_figures_and_files_also_when_stopped_and_continued(deterministic, tmp_path):
    expected, run = deterministic()
    (alone,) = expected.together(size=1)
    assert alone.code == 0 and len(alone.losses) >= 20, alone.output
    first, second = run.together(signal_at=(1, 9))  # one of them alone; 9 is no step of --save_every 4
    assert first.code == second.code == 128 + signal.SIGTERM, first.output + second.output
    assert "interrupted by SIGTERM" in first.output and "step 3; the same command continues" in first.output
    assert second.output == ""
    by_one = replace(run, folder=shutil.copytree(run.folder, tmp_path / "by_one" / run.folder.name))
    first_again, second_again = run.together()
    assert first_again.code == second_again.code == 0, first_again.output
    assert "dropout differs" not in first_again.output
    losses = mean_losses(first, second) + mean_losses(first_again, second_again)
    assert len(first.losses) == 9 and len(losses) == len(alone.losses)
    assert losses[:20] == pytest.approx(alone.losses[:20], rel=1e-4)
    assert_same_figures(run, expected)
    assert second_again.output == "" and first_again.output.count("personalized epoch 2/2") == 1

    (one,) = by_one.together("--output_dir", by_one.folder.parent, size=1)
    assert one.code == 0 and one.output.count("number of processes: 2 before, 1 now; dropout differs") == 1
    assert_same_figures(by_one, expected)


def test_three_processes_with_dropout_continue_with_the_same_masks(deterministic):
    """Each rank's random state is kept, so the same number of ranks continues as if nothing had happened."""
    expected, run = deterministic(dropout_rate=0.3, global_epochs=1, num_epochs=1)
    through, stopped, ended = expected.together(size=3), run.together(size=3, signal_at=(0, 4)), run.together(size=3)
    assert [end.code for end in (*through, *stopped, *ended)] == [0] * 3 + [143] * 3 + [0] * 3, ended[0].output
    # but for the order in which DDP's buckets, which it arranges again at each start, add three numbers
    assert mean_losses(*stopped) + mean_losses(*ended) == pytest.approx(mean_losses(*through), rel=1e-5)


def test_signal_between_two_reads_stops_all_processes_at_the_latest_when_the_epoch_ends(begin):
    first, second = begin().together(signal_at=(1, 2), interval=50)  # as on GPUs, where an epoch may have fewer steps
    assert first.code == second.code == 143, first.output + second.output
    assert len(first.losses) == len(second.losses) == 3 and "is saved up to global epoch 1, step 3;" in first.output


def launch(run, machines=1, *more, **how):
    """`accelerate launch` of two processes on the CPU."""
    launcher = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--num_machines", machines, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"]
    return start(*launcher, free_port() if machines == 1 else 29577, *more, f"{run.script}.py", *run.arguments, **how)


@pytest.mark.slow
def test_accelerate_launch_of_iisan_stopped_by_sigterm_and_continued_has_one_processs_figures(deterministic):
    expected, run = deterministic("iisan")
    expected.child_to_the_end()
    launched = launch(run)
    read_until(launched, "global epoch 1/2")
    launched.send_signal(signal.SIGTERM)
    output, _ = launched.communicate(timeout=600)
    assert launched.returncode != 0
    assert output.count("interrupted by SIGTERM") == 1 and "the same command continues from there" in output, output
    first, second = run.together()
    assert first.code == second.code == 0 and "continuing" in first.output, first.output
    assert_same_figures(run, expected)


def test_users_error_is_reported_once_and_ends_the_launcher(begin):
    launched = launch(begin(clip_model="/nowhere"))
    output, _ = launched.communicate(timeout=600)
    assert launched.returncode != 0
    assert output.count("--clip_model '/nowhere' cannot be loaded") == 1, output
    assert "rank 1: " not in output


def test_error_that_rank_0_alone_meets_ends_the_others(begin):
    run = begin()
    run.folder.mkdir(parents=True)
    with FileLock(run.folder / ".lock"):
        first, second = run.together()
    assert first.code == 2 and first.output.count("another process is training in") == 1
    assert second.code == 1 and second.output.startswith("rank 1: ")
    assert list(tree(run.folder)) == [".lock"]


@pytest.fixture
def machines():
    """Two namespaces with an interface each, joined by a virtual cable."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the program ip")
    one, two = names = [f"perpeft{os.getpid()}m{machine}" for machine in range(2)]
    commands = [f"netns add {one}", f"netns add {two}"]
    commands += [f"link add cable0 netns {one} type veth peer name cable1 netns {two}"]
    for machine, name in enumerate(names):
        inside = (f"addr add 10.77.0.{machine + 1}/24 dev cable{machine}", "link set lo up", f"link set cable{machine} up")
        commands += [f"netns exec {name} ip {command}" for command in inside]
    made = subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), capture_output=True, text=True)
    try:
        if made.returncode:
            pytest.skip(f"no network namespaces can be joined here ({made.stderr.strip()})")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.slow
def test_two_machines_train_what_one_process_does(machines, deterministic):
    expected, run = deterministic("iisan", method="global")
    expected.child_to_the_end()
    processes = []
    for machine, name in enumerate(machines):
        options = "--main_process_ip", "10.77.0.1", "--machine_rank", machine
        where = {"prefix": ("ip", "netns", "exec", name), "GLOO_SOCKET_IFNAME": f"cable{machine}"}
        processes.append(launch(run, 2, *options, **where))
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert_same_figures(run, expected)
    assert outputs[0].count("global epoch 1/4") == 1 and "global epoch" not in outputs[1]
