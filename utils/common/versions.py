"""What differs between the versions of the libraries that this project runs with; nothing else asks for a version."""
import torch

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def has_fused_adamw(device: torch.device) -> bool:
    """Whether AdamW can update all its parameters in one kernel there: on a CPU only from torch 2.4 on."""
    return device.type == "cuda" or (device.type == "cpu" and TORCH >= (2, 4))
