"""Devices: which one to use, its arithmetic, and the seed of its random numbers."""
import contextlib
from collections.abc import Callable

import numpy as np
import torch

from utils.common.errors import PerPEFTError


def choose_device(name: str | None) -> str:
    """The device by that name, or the best there is.

    Raises:
        PerPEFTError: this machine has none of that name.
    """
    if name is None:
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps") or (device.type != "cuda" and device.index):
            raise RuntimeError
    except RuntimeError:
        raise PerPEFTError(f"--device {name} is none of cuda:N, cpu and mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PerPEFTError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use --device cpu or a CUDA build"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise PerPEFTError("--device mps: torch sees no Apple GPU here; use --device cpu")
    return str(device)


def autocast_for(device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    """fp16 autocast on CUDA, nothing elsewhere."""
    if device.type == "cuda":
        return lambda: torch.autocast("cuda", dtype=torch.float16)
    return contextlib.nullcontext


def has_fused_adamw(device: torch.device) -> bool:
    """Whether AdamW can go over all its parameters in one kernel there."""
    return device.type in ("cpu", "cuda")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the machine or of its device is full; every allocator says it differently."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed torch's generators, on every device; numpy's are made from seeds where they are used.

    Args:
        seed: of the run or its stage.
        rank: of the process, so that each of several draws other dropout masks.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, rank)).generate_state(1)[0]) if rank else seed)
