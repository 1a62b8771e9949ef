"""Two machines, as two network namespaces of this one that share its disk, train what one process trains."""
import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import iisan_arguments
from tests.run_files import read_csv
from tests.zygote import ROOT

LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_ip", "10.77.0.1", "--main_process_port", "29577"]


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def machines():
    """Two namespaces with an interface each, joined by a virtual cable."""
    names = [f"perpeft{os.getpid()}m{machine}" for machine in range(2)]
    if not shutil.which("ip") or ip("netns", "add", names[0]).returncode:
        pytest.skip("network namespaces need the program ip and the right to make them")
    try:
        ip("netns", "add", names[1])
        made = ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        if made.returncode:
            pytest.skip(f"no virtual network cable can be made here ({made.stderr.strip()})")
        for machine, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{machine + 1}/24", "dev", f"cable{machine}")
            for interface in ("lo", f"cable{machine}"):
                ip("-n", name, "link", "set", interface, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.slow
def test_two_machines_train_what_one_process_does(zygote, machines, tiny_dataset, tiny_clip, tmp_path):
    short = {"dropout_rate": 0, "global_epochs": 1, "num_epochs": 1, "method": "global"}
    alone = zygote.run(iisan_arguments(tiny_dataset, tiny_clip, tmp_path / "alone", **short), script="perpeft_iisan")
    assert alone.code == 0, alone.output
    arguments = [str(part) for part in iisan_arguments(tiny_dataset, tiny_clip, tmp_path / "both", **short)]
    processes = []
    for machine, name in enumerate(machines):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": f"cable{machine}"}
        command = ["ip", "netns", "exec", name, sys.executable, *LAUNCH, "--machine_rank", str(machine), "perpeft_iisan.py"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, **pipes))
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (one,), (two,) = ([read_csv(path) for path in (tmp_path / name).glob("*/metrics.csv")] for name in ("alone", "both"))
    assert len(one) == len(two) == 2
    for row, other in zip(one, two):
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-4)
        assert float(row["test_HR@20"]) == pytest.approx(float(other["test_HR@20"]), abs=0.03)
    assert outputs[0].count("global epoch 1/2") == 1 and "global epoch" not in outputs[1]
