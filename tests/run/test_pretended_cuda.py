"""Runs on a pretended cuda:0 (tests/fake_cuda): what a CPU can show of training on a GPU, in a process of its own."""
import shutil
import subprocess
import sys

import pytest
import torch

from tests.zygote import ROOT


def test_runs_on_a_pretended_gpu_pass_the_checks_of_fake_cuda(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("the pretended CUDA device needs g++")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("CUDA can be pretended on a CPU build of torch only")
    checks = ["-p", "tests.fake_cuda.device", "tests/fake_cuda/checks.py", f"--basetemp={tmp_path}"]
    done = subprocess.run([sys.executable, "-m", "pytest", *checks], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
