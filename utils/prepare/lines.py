"""The physical lines of a text file for DuckDB: unpacked, decoded and verified on the way, through a pipe.

DuckDB could open the files itself, but it passes over damage in compressed ones without a word, and knows few encodings.
"""
import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import threading
import zlib
from ast import literal_eval
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import duckdb
from tqdm import tqdm

from utils.common.errors import PerPEFTError

BLOCK = 2**20  # bytes per read
LONGEST_LINE = 2**24  # bytes
SEPARATOR = "\x1e\x1f\x1e\x1f"  # DuckDB needs one; no text holds this
LINES = (  # of a file's name, as a table of one column `line`; NULL where a line is empty
    f"read_csv(%s, columns={{'line': 'VARCHAR'}}, delim='{SEPARATOR}', quote='', escape='', header=false, auto_detect=false, "
    f"null_padding=false, strict_mode=false, max_line_size={LONGEST_LINE}, compression='none')"
)
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
ZSTD, ZIP = b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip


class _ZstdStream(io.RawIOBase):
    """Decompresses a .zst file, several frames too, and raises EOFError where it is cut off."""

    def __init__(self, file: BinaryIO):
        try:
            import zstandard
        except ImportError:
            raise PerPEFTError(f"{file.name}: reading .zst needs the package zstandard; install it, or unpack: zstd -d") from None
        self._file, self._start, self._ready = file, zstandard.ZstdDecompressor().decompressobj, b""
        self._frame = self._start()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            if self._frame.eof:  # another frame may follow
                packed = self._frame.unused_data or self._file.read(2**16)
                if not packed:
                    return 0
                self._frame = self._start()
            else:
                packed = self._file.read(2**16)
                if not packed:
                    raise EOFError
            self._ready = self._frame.decompress(packed)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def unpacked(file: BinaryIO) -> BinaryIO:
    """A reader of a file's content, decompressed if its first bytes say that it is compressed, whatever its name."""
    start = file.read(8)
    file.seek(0)
    if start.startswith(ZIP):
        raise PerPEFTError(f"{file.name} is a zip or Excel file; unpack it, or save the sheet as CSV")
    if start.startswith(ZSTD):
        return io.BufferedReader(_ZstdStream(file), BLOCK)
    return next((opener(file) for magic, opener in OPENERS.items() if start.startswith(magic)), file)


def recognise_encoding(start: bytes, path: Path) -> str:
    """UTF-8 unless the first bytes of a file say otherwise.

    Raises:
        PerPEFTError: it is no text.
    """
    for mark, encoding in MARKS.items():
        if start.startswith(mark):
            return encoding
    for place, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if start[place::2].count(0) > len(start) // 8 and not start[1 - place :: 2].count(0):
            return encoding
    if b"\0" in start[:2**16]:
        raise PerPEFTError(f"{path} is not a text file; use CSV, TSV, JSON lines or Parquet")
    return "utf-8-sig"


def is_damage(error: Exception) -> bool:
    """Whether an error says that a compressed file is cut off or damaged."""
    kinds = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
    return isinstance(error, kinds) or type(error).__name__ == "ZstdError" or (type(error) is OSError and error.errno is None)


def _readable(error: Exception, path: Path) -> Exception:
    """The error of a reading thread as a sentence."""
    if is_damage(error):
        return PerPEFTError(f"{path} is cut off or damaged; fetch it again")
    if isinstance(error, UnicodeError):
        return PerPEFTError(f"{path} is not text in the encoding {error.encoding} ({error.reason}); choose another --encoding")
    return error


class _Pump(threading.Thread):
    """Writes a file's text into a pipe as UTF-8, and JSON arrays or Python dicts as JSON lines."""

    def __init__(self, path: Path, encoding: str | None, target: int):
        super().__init__(daemon=True)
        self.path, self.encoding, self.target = path, encoding, target
        self.error: Exception | None = None

    def run(self) -> None:
        """Write until the end of the file, or until nobody reads any more."""
        try:
            size = os.path.getsize(self.path)
            with (
                os.fdopen(self.target, "wb", buffering=0) as pipe,
                self.path.open("rb") as file,
                tqdm(desc=self.path.name, total=size, unit="B", unit_scale=True, delay=1, disable=None) as bar,
            ):
                for block in self._blocks(unpacked(file)):
                    pipe.write(block)
                    bar.update(file.tell() - bar.n)
        except BrokenPipeError:
            pass
        except Exception as error:
            self.error = _readable(error, self.path)

    def _blocks(self, file: BinaryIO) -> Iterator[bytes]:
        block = file.read(BLOCK)
        encoding = self.encoding or recognise_encoding(block, self.path)
        start = block[:1000].lstrip()
        if start.startswith(b"{'"):
            yield from map(_json_line, _lines_of(block, file))
        elif start.startswith(b"[") and start[1:].lstrip().startswith((b"{", b"]")):
            yield from _array_lines(block + file.read(), self.path)
        elif codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
            while block:
                yield block
                block = file.read(BLOCK)
        else:
            decoder = codecs.getincrementaldecoder(encoding)()
            while block:
                yield decoder.decode(block).encode()
                block = file.read(BLOCK)
            yield decoder.decode(b"", final=True).encode()


def _lines_of(block: bytes, file: BinaryIO) -> Iterator[bytes]:
    yield from (block + file.readline()).splitlines(keepends=True)
    yield from file


def _json_line(line: bytes) -> bytes:
    """A line of the 2014 release, a Python dict, as JSON; any other line as it is."""
    try:
        return json.dumps(literal_eval(line.decode())).encode() + b"\n"
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return line


def _array_lines(content: bytes, path: Path) -> Iterator[bytes]:
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PerPEFTError(f"{path} is neither a JSON array nor JSON lines ({error})") from error
    yield from (json.dumps(row).encode() + b"\n" for row in rows)


@contextlib.contextmanager
def lines_of(path: Path, encoding: str | None) -> Iterator[str]:
    """A name under which DuckDB can read a file's text once, by `LINES`.

    Args:
        path: a text file, also compressed by gzip, bzip2, xz or zstd.
        encoding: None: UTF-8, or what its byte order mark says.
    Raises:
        PerPEFTError: when the block ends: the file is damaged or no text in that encoding, or a line is too long.
    """
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError:
        raise PerPEFTError(f"--encoding {encoding[:40]}: no such encoding; common ones are utf-16, latin-1, cp1252") from None
    source, target = os.pipe()
    pump = _Pump(path, encoding, target)
    pump.start()
    failed = None
    try:
        yield f"/dev/fd/{source}"
    except duckdb.InvalidInputException as error:
        failed = error
    finally:
        os.close(source)
        pump.join()
    if pump.error is not None:
        raise pump.error
    if failed is not None:
        raise PerPEFTError(_csv_error(path, str(failed))) from failed


def _csv_error(path: Path, text: str) -> str:
    line = text.partition("CSV Error on Line: ")[2].partition("\n")[0]
    where = f"{path}, line {line}" if line else str(path)
    if "unicode" in text.lower() or "utf" in text.lower():
        return f"{where}: not utf-8 text; name its encoding by --encoding, for example --encoding cp1252"
    if "maximum" in text.lower():
        return f"{where}: longer than {LONGEST_LINE:,} bytes"
    return f"{where}: cannot be read ({text.splitlines()[0][:200]})"
