"""The choice of a device, and memory of freed tensors."""
import subprocess
import sys

import pytest

ALLOCATE = """
import platform, resource
import torch
from utils.common.devices import choose_device

def fewest_faults():
    faults = []
    for _ in range(30):  # the heap grows at first
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(25_000_000)  # 100 MB
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(faults)

before = fewest_faults()
choose_device("cpu")
print(platform.libc_ver()[0], before, fewest_faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc alone")
def test_memory_of_a_freed_tensor_serves_the_next_one():
    done = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, check=True)
    library, before, after = done.stdout.split()
    if library != "glibc":
        pytest.skip("of glibc alone")
    assert int(before) > 40 and int(after) < 20  # pages claimed anew, where huge ones have 2 MiB
