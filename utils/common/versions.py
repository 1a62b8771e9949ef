"""What differs between the versions of the libraries that this project runs with; nothing else asks for a version."""
from importlib import metadata

from utils.common.errors import PerPEFTError

NEEDS_TORCH = {("numpy", 2): (2, 3), ("transformers", 5): (2, 4)}  # from that major version on, that torch or a newer one


def installed_version(library: str) -> tuple[int, int]:
    """Major and minor version of an installed library, (0, 0) of one that is not there; does not import it."""
    try:
        major, minor = metadata.version(library).split(".")[:2]
    except metadata.PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


def check_versions() -> None:
    """Refuse libraries that do not work together, which would otherwise end somewhere inside them; imports none.

    Raises:
        PerPEFTError: numpy or transformers is too new for the installed torch.
    """
    torch = installed_version("torch")
    if torch == (0, 0):  # unzip_data.py runs before it is installed
        return
    too_new = [name for (name, major), least in NEEDS_TORCH.items() if torch < least and installed_version(name)[0] >= major]
    if too_new:
        found = " and ".join(f"{name} {metadata.version(name)}" for name in too_new)
        raise PerPEFTError(
            f"torch {metadata.version('torch')} cannot work with {found}; run pip install -r requirements.txt -c "
            "constraints-torch2.2.txt, or install torch 2.4 or later"
        )


def has_fused_adamw(device_type: str) -> bool:
    """Whether AdamW can update all its parameters in one kernel on such a device: on a CPU only from torch 2.4 on."""
    return device_type == "cuda" or (device_type == "cpu" and installed_version("torch") >= (2, 4))
