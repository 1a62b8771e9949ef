"""Memory of freed tensors on the chosen device."""
import platform
import subprocess
import sys

import pytest

ALLOCATE = """
import resource
import torch
from utils.common.devices import choose_device

def fewest_faults():
    faults = []
    for _ in range(30):  # the heap grows at first
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(25_000_000)  # 100 MB
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(faults)

print(fewest_faults(), choose_device("cpu"), fewest_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_memory_of_a_freed_tensor_serves_the_next_one():
    done = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True)
    before, _, chosen = done.stdout.split()
    assert int(before) > 40  # pages claimed anew, even if they are huge ones of 2 MiB; so the test can tell
    assert int(chosen) < 20
