"""The choice of a device, and memory of freed tensors."""
import subprocess
import sys

import pytest

ALLOCATE = """
import platform, resource, sys
import torch
from utils.common.devices import choose_device
if "chosen" in sys.argv:
    choose_device("cpu")
faults = []
for _ in range(30):  # the heap grows at first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)  # 100 MB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(platform.libc_ver()[0], min(faults))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc alone")
def test_memory_of_a_freed_tensor_serves_the_next_one():
    def faults(*arguments: str) -> tuple[str, int]:
        command = [sys.executable, "-c", ALLOCATE, *arguments]
        library, least = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return library, int(least)

    library, least = faults("chosen")
    if library != "glibc":
        pytest.skip("of glibc alone")
    assert least < 20  # pages claimed anew
    assert faults()[1] > 40  # even with huge pages of 2 MiB; so the test can tell
