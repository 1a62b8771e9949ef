"""Files and folders that appear whole or not at all, whatever happens on the way."""
import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

TEMPORARY, OLD = ".tmp", ".old"  # suffixes of hidden names: what is being written, and what it is about to replace


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A failing write names no file: let the error that leaves this block say which one was being written."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it to the disk, and rename it into place.

    Whatever happens on the way, `path` holds either what it held before or all of the new. One process at a time may write a
    path: see `made_by_one`.
    """
    path = Path(path)
    temporary = _hidden(path, TEMPORARY)
    with _naming(path):
        try:
            write(temporary)
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text_atomically(path: str | Path, text: str) -> None:
    """`write_atomically` for a text."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_tensors(value: Any, path: str | Path) -> None:
    """`torch.save` that tells a failing write as the OSError it is.

    Raises:
        OSError: the disk is full, say.
    """
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch's own writer, on its way out, covers the file's error with one that has no reason
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


@contextlib.contextmanager
def folder_written_atomically(folder: str | Path) -> Iterator[Path]:
    """Give a temporary folder to fill; when the block ends well, it takes the place of `folder`.

    One process at a time may write a folder: see `made_by_one`.
    """
    folder = Path(folder)
    temporary, old = _hidden(folder, TEMPORARY), _hidden(folder, OLD)
    with _naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _settle(folder)
        temporary.mkdir()
        try:
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                _sync(path)
            if folder.exists():  # a folder cannot be renamed over another, so the old one steps aside first
                os.rename(folder, old)
            os.rename(temporary, folder)
            _sync(folder.parent)
        finally:
            _settle(folder)


def _settle(path: Path) -> None:
    """Remove what a writing of `path` that was broken off left; between its two renames, what was there before comes back."""
    temporary, old = _hidden(path, TEMPORARY), _hidden(path, OLD)
    if old.exists() and not path.exists():
        os.rename(old, path)
    for leftover in (temporary, old):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while writing left in `folder`; nobody else may be writing there."""
    for leftover in [path for path in folder.glob(".*") if path.suffix in (TEMPORARY, OLD)]:
        _settle(folder / leftover.stem.removeprefix("."))


def add_model_files(digest: "hashlib._Hash", folder: str | Path) -> None:
    """Let a hash take in a model folder's settings and weights, by which it is known again wherever it lies."""
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".txt", ".safetensors", ".bin"):
            with path.open("rb") as file:
                for block in iter(lambda: file.read(2**20), b""):
                    digest.update(block)


@contextlib.contextmanager
def made_by_one(path: str | Path) -> Iterator[bool]:
    """Let one of several processes that need `path` make it, while the others wait; a process that dies lets go.

    Yields:
        Whether it is still to be made.
    """
    path = Path(path)
    if path.exists():  # no lock then: what is there may lie in a folder that can only be read
        yield False
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_hidden(path, ".lock")):
        yield not path.exists()
