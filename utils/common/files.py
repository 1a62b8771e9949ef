"""Files and folders that appear whole or not at all, also after a crash."""
import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

TEMPORARY, OLD = ".tmp", ".old"  # suffixes of hidden names: what is being written, and what it is about to replace


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def sync(path: str | Path) -> None:
    """Make a file's content or a folder's names last on the disk; file systems that cannot sync folders are left alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not Path(path).is_dir():
            raise


@contextlib.contextmanager
def _replaced_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there is synced and renamed into place. An OSError names `path`."""
    temporary, old = _hidden(path, TEMPORARY), _hidden(path, OLD)
    try:
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            sync(written)
        if not temporary.is_dir():
            os.replace(temporary, path)
        else:
            if path.exists():  # a folder cannot be renamed over another, so the old one steps aside first
                os.rename(path, old)
            os.rename(temporary, path)
        sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        _settle(path)


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path beside `path`, sync the file and rename it into place.

    `path` holds either its old content or all of the new. One process at a time may write a path, see `build_once`.
    """
    with _replaced_atomically(Path(path)) as temporary:
        write(temporary)


def write_text_atomically(path: str | Path, text: str) -> None:
    """`write_atomically` for a text."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """`write_text_atomically` for readable JSON."""
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")


def write_pickle(path: str | Path, value: Any) -> None:
    """`write_atomically` for a pickle of plain values."""
    write_atomically(path, lambda temporary: temporary.write_bytes(pickle.dumps(value, protocol=4)))


def save_tensors(value: Any, path: str | Path) -> None:
    """`torch.save` that raises a failing write, such as to a full disk, as an OSError."""
    import torch  # only here, so that unzip_data.py starts quickly and runs before torch is installed

    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch's writer hides the file's error behind one without a reason
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


@contextlib.contextmanager
def folder_written_atomically(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, which takes the place of `folder` if all goes well; one process at a time, see `build_once`."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _settle(folder)
    with _replaced_atomically(folder) as temporary:
        temporary.mkdir()
        yield temporary


def _settle(path: Path) -> None:
    """Remove what an interrupted write of `path` left; if it was interrupted between its two renames, restore the old one."""
    temporary, old = _hidden(path, TEMPORARY), _hidden(path, OLD)
    if old.exists() and not path.exists():
        os.rename(old, path)
    for leftover in (temporary, old):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while writing left in `folder`; no other process may be writing there."""
    for leftover in [path for path in folder.glob(".*") if path.suffix in (TEMPORARY, OLD)]:
        _settle(folder / leftover.stem.removeprefix("."))


@contextlib.contextmanager
def build_once(path: str | Path, is_built: Callable[[], bool] | None = None) -> Iterator[bool]:
    """Let one of several processes build `path` while the others wait; a process that dies releases its lock.

    Args:
        path: a file or a folder.
        is_built: whether what is there serves; by default anything does.
    Yields:
        whether it is still to be built
    """
    path = Path(path)
    is_built = is_built or path.exists
    if is_built():  # without a lock: an existing path may be in a read-only folder
        yield False
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_hidden(path, ".lock")):
        yield not is_built()
