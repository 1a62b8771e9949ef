"""Runs on a pretended cuda:0 (tests/fake_cuda): what a CPU can show of training on a GPU, in a process of its own."""
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.zygote import ROOT, environment

ADAPTERS = ("lora", "ia3", "iisan")
FP32 = {"SASRec", "MultiheadAttention", "PointWiseFeedForward", "MMProjector", "IISAN", "_LayerwiseLinear"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the runs of tests/fake_cuda/run.py print."""
    if shutil.which("g++") is None:
        pytest.skip("the pretended CUDA device needs g++")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("CUDA can be pretended on a CPU build of torch only")
    folder = tmp_path_factory.mktemp("cuda")
    library = folder / "backend.so"
    include = Path(importlib.util.find_spec("torch").origin).parent / "include"
    source = ROOT / "tests" / "fake_cuda" / "backend.cpp"
    build = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[:3000]
    command = [sys.executable, "-m", "tests.fake_cuda.run", str(library), str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_pretended_device_records_waits_frozen_weights_may_be_cast_once_and_a_run_goes_from_cpu_to_cuda_and_back(seen):
    assert seen["waits"] == 5 and seen["cast_once"] and seen["resumed"]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_no_step_encoding_or_ranking_chunk_waits_for_the_device(seen, kind):
    assert seen[kind]["waits"] == {}


def test_only_the_foundation_model_computes_under_autocast(seen):
    assert seen["lora"]["autocast"]["CLIPEncoderLayer"] == seen["ia3"]["autocast"]["CLIPEncoderLayer"] == [True]
    for kind in ADAPTERS:
        under = {name for name, on in seen[kind]["autocast"].items() if True in on}
        assert not under & FP32
        assert FP32 & set(seen[kind]["autocast"])


@pytest.mark.parametrize("kind", ADAPTERS)
def test_overflow_skips_the_whole_step_and_is_counted(seen, kind):
    skipped = [changed for count, changed in seen[kind]["steps"] if count]
    taken = [changed for count, changed in seen[kind]["steps"] if not count]
    assert set(skipped) == ({0} if kind != "iisan" else set())  # which computes in fp32, and so overflows never
    assert taken and len(set(taken)) == 1 and taken[0] > 0  # SASRec, one projector, one adapter


@pytest.mark.parametrize("kind", ADAPTERS)
def test_saved_weights_are_no_cuda_tensors(seen, kind):
    assert {Path(name).parent.name for name in seen[kind]["device_files"]} <= {"resume"}  # read with map_location="cpu"
