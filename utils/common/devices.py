"""Devices: which one to use, how arrays reach it, its arithmetic, and the seed of its random numbers."""
import contextlib
import ctypes
import os
import sys

import numpy as np
import torch

from utils.common.console import launched_ranks
from utils.common.errors import PerPEFTError

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}  # what autocast computes in


def choose_device(name: str | None) -> str:
    """The device by that name, or the best there is, made ready; of several launched ranks, each takes the GPU of its own number.

    Raises:
        PerPEFTError: this machine has none of that name, or fewer GPUs than ranks.
    """
    several = launched_ranks() > 1
    if several and name not in (None, "cpu", "cuda", "cuda:0"):
        raise PerPEFTError(f"--device {name}: with several processes each takes a GPU of its own; leave --device out or use cpu")
    if several and name != "cpu" and torch.cuda.is_available():
        ranks_here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if ranks_here > gpus:
            raise PerPEFTError(f"{ranks_here} processes were started on {gpus} GPUs; start as many, or add --device cpu")
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if name is None:
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps") or (device.type != "cuda" and device.index):
            raise RuntimeError
    except RuntimeError:
        raise PerPEFTError(f"--device {name} is not one of cuda:N, cpu and mps") from None
    if device.type == "cuda" and (device.index or 0) >= (gpus := torch.cuda.device_count()):
        raise PerPEFTError(f"--device {name}: torch sees {gpus} CUDA devices here; use --device cpu or a CUDA build")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise PerPEFTError("--device mps: torch sees no Apple GPU here; use --device cpu")
    if device.type == "cpu":
        _keep_freed_memory()
    return str(device)


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, which it would otherwise return to the system above 32 MB.

    Claiming and zeroing the pages anew in each step takes over a quarter of a LoRA step's time on images of 224 pixels.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets a mapping of its own
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def to_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """An array or a tensor as a tensor on a device; the host does not wait for the copy to a GPU."""
    tensor = torch.as_tensor(values)
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed torch's generators, on every device; each rank draws its own dropout masks. numpy's are seeded where they are used."""
    torch.manual_seed(int(np.random.SeedSequence((seed, rank)).generate_state(1)[0]) if rank else seed)
