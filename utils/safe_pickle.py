"""Pickles read without running anything: plain dict, list, tuple, str, numbers, bool and None only."""
import pickle
from pathlib import Path
from typing import Any

from utils.errors import PerPEFTError


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every global, so that no class or function named in a pickle is ever imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        raise PerPEFTError(f"the pickle names the type {module}.{name}; only plain dicts, lists, strings and numbers are read")

    def persistent_load(self, pid: Any) -> Any:
        raise PerPEFTError("the pickle holds a persistent reference; only plain dicts, lists, strings and numbers are read")


def load_pickle(path: str | Path) -> Any:
    """Read a pickle of plain Python values.

    Args:
        path: the pickle file.
    Returns:
        The value in it.
    Raises:
        PerPEFTError: the file is missing, is no pickle, is cut off, or names any type beyond the plain ones.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _PlainUnpickler(file).load()
    except FileNotFoundError:
        raise PerPEFTError(f"{path} is missing") from None
    except PerPEFTError as error:
        raise PerPEFTError(f"{path} is refused: {error}. Write it again with pickle.dump of a plain dict.") from None
    except Exception as error:  # a damaged pickle can raise nearly anything: struct.error, EOFError, MemoryError, ...
        reason = f"{type(error).__name__}: {error}"
        raise PerPEFTError(f"{path} is not a readable pickle ({reason}). Fetch or write it again.") from None
