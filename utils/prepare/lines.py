"""The text of a file, unpacked and decoded: for DuckDB by its name or through a pipe, for Python verified line by line.

DuckDB could unpack files itself, but it passes over damage in compressed ones without a word, and knows few encodings.
"""
import bz2
import codecs
import collections
import contextlib
import glob
import io
import itertools
import lzma
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.common.errors import PerPEFTError

try:
    import zstandard
except ImportError:
    zstandard = None

BLOCK, PACKED_BLOCK = 2**16, 2**12  # bytes per read; the latter of packed files, since each may unpack to thousands
LONGEST_LINE = 2**24  # bytes
SEPARATOR = "\x1e\x1f\x1e\x1f"  # DuckDB needs one; no text holds this
ZSTD, ZIP = b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
FRAMES = {  # by the first bytes of a packed file, what unpacks one frame of it
    b"\x1f\x8b": lambda: zlib.decompressobj(wbits=31),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ": lzma.LZMADecompressor,
    ZSTD: lambda: zstandard.ZstdDecompressor().decompressobj(),
}
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip


def _content(path: Path, encoding: str | None) -> tuple[Iterable[bytes], str, bool]:
    """A file's unpacked content, its encoding, and whether it is not packed, which its first bytes say, whatever its name."""
    with path.open("rb") as file:
        start = file.read(BLOCK)
    if start.startswith(ZIP):
        raise PerPEFTError(f"{path} is a zip or Excel file; unpack it, or save the sheet as CSV")
    if start.startswith(ZSTD) and zstandard is None:
        raise PerPEFTError(f"{path}: reading .zst needs the package zstandard; install it, or unpack: zstd -d")
    new_frame = next((new_frame for mark, new_frame in FRAMES.items() if start.startswith(mark)), None)
    blocks = _blocks(path, BLOCK if new_frame is None else PACKED_BLOCK)
    if new_frame is not None:
        blocks = _unpacked(blocks, new_frame)
        start = next(blocks, b"")
        blocks = itertools.chain([start], blocks)
    return blocks, encoding or _recognise_encoding(start, path), new_frame is None


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    """A file's bytes, with a progress bar."""
    bar = tqdm(desc=path.name, total=path.stat().st_size, unit="B", unit_scale=True, delay=1, disable=None)
    with path.open("rb") as file, bar:
        while block := file.read(size):
            bar.update(len(block))
            yield block


def _unpacked(blocks: Iterable[bytes], new_frame: Callable[[], Any]) -> Iterator[bytes]:
    """The content of one or several frames, after which there may be zeros; raises EOFError for what is cut off or damaged."""
    frame = new_frame()
    for packed in blocks:
        while packed := (packed.lstrip(b"\0") if frame.eof else packed):
            if frame.eof:
                frame = new_frame()
            try:
                content = frame.decompress(packed)
            except MemoryError:
                raise
            except Exception as error:  # every kind of packing has errors of its own
                raise EOFError from error
            yield from (content[start : start + BLOCK] for start in range(0, len(content), BLOCK))
            packed = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError


def _decoded(blocks: Iterable[bytes], encoding: str) -> Iterator[str]:
    """The text of a file's content; up to the first fault, if there is one."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
    block = b""
    try:
        for block in blocks:
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeError as error:
        if isinstance(error, UnicodeDecodeError):
            faulty = len(error.object) - error.start  # `object` may begin with the end of another block
            yield decoder.decode(block[: max(0, len(block) - faulty)])
        collections.deque(blocks, maxlen=0)  # to the end, where damage may show as the reason
        raise


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
    number, rest = 0, ""
    try:
        blocks, encoding, _ = _content(path, encoding)
        for text in _decoded(blocks, encoding):
            first, *others = text.split("\n")
            rest += first  # in place: a long line is not copied with every block
            lines = [rest, *others]
            if max(map(len, lines)) >= LONGEST_LINE:
                number += next(place for place, line in enumerate(lines, 1) if len(line) >= LONGEST_LINE)
                raise PerPEFTError(f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes")
            rest = lines.pop()
            yield from lines
            number += len(lines)
        if rest:
            yield rest
    except UnicodeError as error:
        reason, advice = getattr(error, "reason", error), "name its encoding by --encoding, for example --encoding cp1252"
        raise PerPEFTError(f"{path}, line {number + 1}: not {encoding} text ({reason}); {advice}") from error
    except EOFError as error:
        raise PerPEFTError(f"{path} is cut off or damaged after line {number:,}; download or copy it again") from error


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
    blocks, encoding, is_plain = _content(path, encoding)
    is_utf8 = codecs.lookup(encoding).name == "utf-8"
    if is_plain and is_utf8:
        yield glob.escape(str(path))
    else:
        with _pipe(iter(blocks) if is_utf8 else map(str.encode, _decoded(blocks, encoding))) as source:
            yield source


def named_lines(lines: Iterable[str]) -> contextlib.AbstractContextManager[str]:
    """A name under which DuckDB can read some lines once; when the block ends, what `lines` raised is raised."""
    lines = iter(lines)
    batches = iter(lambda: "".join(f"{line}\n" for line in itertools.islice(lines, 1000)), "")
    return _pipe(batch.encode(errors="replace") for batch in batches)


@contextlib.contextmanager
def _pipe(blocks: Iterator[bytes]) -> Iterator[str]:
    """A pipe's name, and a thread that writes blocks into it until their end, or until nobody reads any more."""
    errors: list[Exception] = []

    def write() -> None:
        try:
            with contextlib.suppress(BrokenPipeError), os.fdopen(target, "wb", buffering=0) as pipe:
                for block in blocks:
                    pipe.write(block)
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
