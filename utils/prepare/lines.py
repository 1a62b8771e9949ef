"""The text of a file, unpacked and decoded: for DuckDB by its name or through a pipe, for Python verified line by line.

DuckDB could unpack files itself, but it passes over damage in compressed ones without a word, and knows few encodings.
"""
import bz2
import codecs
import contextlib
import glob
import gzip
import io
import itertools
import lzma
import os
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from utils.common.errors import PerPEFTError

BLOCK = 2**20  # bytes per read
LONGEST_LINE = 2**24  # bytes
SEPARATOR = "\x1e\x1f\x1e\x1f"  # DuckDB needs one; no text holds this
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
ZSTD, ZIP = b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip


class _ShownFile(io.FileIO):
    """A file with a progress bar of the bytes read."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._bar = tqdm(desc=path.name, total=path.stat().st_size, unit="B", unit_scale=True, delay=1, disable=None)

    def readinto(self, buffer: memoryview) -> int:
        count = super().readinto(buffer)
        self._bar.update(count)
        return count

    def close(self) -> None:
        self._bar.close()
        super().close()


class _ZstdStream(io.RawIOBase):
    """Decompresses a .zst file, several frames too, and raises EOFError where it is cut off."""

    def __init__(self, file: BinaryIO, path: Path):
        try:
            import zstandard
        except ImportError:
            raise PerPEFTError(f"{path}: reading .zst needs the package zstandard; install it, or unpack: zstd -d") from None
        self._file, self._start, self._ready = file, zstandard.ZstdDecompressor().decompressobj, b""
        self._frame = self._start()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            ended = self._frame.eof
            packed = (self._frame.unused_data if ended else b"") or self._file.read(2**16)
            if not packed and not ended:
                raise EOFError
            if not packed:
                return 0
            if ended:  # another frame follows
                self._frame = self._start()
            self._ready = self._frame.decompress(packed)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


@contextlib.contextmanager
def _open(path: Path, encoding: str | None) -> Iterator[tuple[BinaryIO, str, bool]]:
    """A file's unpacked content, its encoding, and whether it is not packed, which its first bytes say, whatever its name."""
    with io.BufferedReader(_ShownFile(path), BLOCK) as file:
        start = file.peek(8)[:8]
        if start.startswith(ZIP):
            raise PerPEFTError(f"{path} is a zip or Excel file; unpack it, or save the sheet as CSV")
        opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), None)
        content = opener(file) if opener else file
        if start.startswith(ZSTD):
            content = io.BufferedReader(_ZstdStream(file, path), BLOCK)
        yield content, encoding or _recognise_encoding(content.peek(BLOCK), path), content is file


def _recognise_encoding(start: bytes, path: Path) -> str:
    if encoding := next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), None):
        return encoding
    for place, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if start[place::2].count(0) > len(start) // 8 and not start[1 - place :: 2].count(0):
            return encoding
    if b"\0" in start[:2**16]:
        raise PerPEFTError(f"{path} is not a text file; use CSV, TSV, JSON lines or Parquet")
    return "utf-8"


def require_encoding(encoding: str | None) -> None:
    """Raise a PerPEFTError for an encoding that Python does not know."""
    try:
        "".encode(encoding or "utf-8")
    except (LookupError, ValueError):
        raise PerPEFTError(f"--encoding {encoding[:40]}: no such encoding; common ones are utf-16, latin-1, cp1252") from None


def text_lines(path: Path, encoding: str | None = None) -> Iterator[str]:
    """The lines of a text file, which may be compressed, without their ends.

    Raises:
        PerPEFTError: the file is damaged; a line is not of the encoding, or too long.
    """
    number = 0
    try:
        with _open(path, encoding) as (content, encoding, _):
            for number, line in enumerate(io.TextIOWrapper(content, encoding), 1):
                if len(line) > LONGEST_LINE:
                    raise PerPEFTError(f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes")
                yield line.removesuffix("\n")
    except Exception as error:
        if isinstance(error, UnicodeError):
            error = _undecodable(path, encoding, getattr(error, "reason", str(error)))
        if not _is_damage(error):
            raise error from None
        raise PerPEFTError(f"{path} is cut off or damaged after line {number:,}; download or copy it again") from error


def _is_damage(error: Exception) -> bool:
    """Whether an error says that a compressed file is cut off or damaged."""
    kinds = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
    return isinstance(error, kinds) or type(error).__name__ == "ZstdError" or (type(error) is OSError and error.errno is None)


def _undecodable(path: Path, encoding: str, reason: str) -> Exception:
    """The error of a file that cannot be decoded: damage if that is why, else one that names the line.

    Lines are split as bytes, which holds for encodings that contain ASCII.
    """
    first = None
    try:
        with _open(path, encoding) as (content, _, _):
            for number, line in enumerate(content, 1):  # to the end, where damage may show
                try:
                    line.decode(encoding)
                except UnicodeError:
                    first = first or number
    except Exception as error:
        return error
    advice = "name its encoding by --encoding, for example --encoding cp1252"
    return PerPEFTError(f"{path}, line {first or 1}: not {encoding} text ({reason}); {advice}")


def lines_sql(source: str, skip: int = 0) -> str:
    """SQL of a file's lines after the first `skip`, as a table of one column `line`; NULL where a line is empty."""
    return (
        f"read_csv({source}, columns={{'line': 'VARCHAR'}}, delim='{SEPARATOR}', quote='', escape='', header=false, skip={skip}, "
        f"auto_detect=false, null_padding=false, strict_mode=false, compression='none', max_line_size={LONGEST_LINE}, "
        f"buffer_size={2 * LONGEST_LINE})"
    )


@contextlib.contextmanager
def named_text(path: Path, encoding: str | None) -> Iterator[str]:
    """A name under which DuckDB can read a file's text once: its own where it is plain UTF-8, else a pipe's."""
    with _open(path, encoding) as (content, name, is_plain):
        is_utf8 = codecs.lookup(name).name == "utf-8"
        if not (is_plain and is_utf8):
            with _pipe(_blocks(content) if is_utf8 else _decoded(content, name)) as source:
                yield source
            return
    yield glob.escape(str(path))


def named_lines(lines: Iterable[str]) -> contextlib.AbstractContextManager[str]:
    """A name under which DuckDB can read some lines once; when the block ends, what `lines` raised is raised."""
    lines = iter(lines)
    batches = iter(lambda: "".join(f"{line}\n" for line in itertools.islice(lines, 1000)), "")
    return _pipe(batch.encode(errors="replace") for batch in batches)


def _blocks(content: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: content.read(BLOCK), b"")


def _decoded(content: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    yield from (decoder.decode(block).encode() for block in _blocks(content))
    yield decoder.decode(b"", final=True).encode()


@contextlib.contextmanager
def _pipe(blocks: Iterator[bytes]) -> Iterator[str]:
    """A pipe's name, and a thread that writes blocks into it until their end, or until nobody reads any more."""
    errors: list[Exception] = []

    def write() -> None:
        try:
            with os.fdopen(target, "wb", buffering=0) as pipe:
                for block in blocks:
                    pipe.write(block)
        except BrokenPipeError:
            pass
        except Exception as error:
            errors.append(error)

    source, target = os.pipe()
    writer = threading.Thread(target=write, daemon=True)  # not a pool, which a signal before `try` would wait for
    writer.start()
    try:
        yield f"/dev/fd/{source}"
    finally:
        os.close(source)
        writer.join()
        if errors:
            raise errors[0]
