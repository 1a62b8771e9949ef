"""Text files of rows: compression, encoding, separator and quotation marks, recognised before anything is read."""

import collections
import csv
import gzip
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from utils.common.errors import PerPEFTError

SAMPLE = 2**16  # bytes from which the encoding's family and the separator are recognised
SEPARATORS = ("\t", ";", ",", "|", "::")
CELL, NEWLINE = "\x1f", "\x1e"  # between the cells, and for line breaks within one, of the files written for DuckDB
LONGEST_RECORD = 1000  # lines that a quoted cell may span
MARKS = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
NOT_PLAIN = (b'"', b"\n\n", b"\n\r", b"\0", b"\x01", b"\x1e", b"\x1f", b"\xef\xbb\xbf")
ONE_LINE = str.maketrans({CELL: " ", NEWLINE: " ", "\x01": " ", "\x02": " ", "\0": None, "\r": NEWLINE, "\n": NEWLINE})
csv.field_size_limit(2**27)


@dataclass(frozen=True)
class TextFile:
    """A text file's form.

    Attributes:
        path: of the file.
        encoding, separator: as Python names them.
        header: the names of the columns; "1", "2", ... where the file begins with a row.
        has_header: whether its first line names the columns.
    """

    path: Path
    encoding: str
    separator: str
    header: list[str]
    has_header: bool = True

    def lines(self) -> Iterator[str]:
        """The lines without their ends.

        Raises:
            PerPEFTError: a line is not of the encoding, or the file is damaged.
        """
        number = 0
        try:
            with _open_text(self.path, self.encoding) as file:
                for line in file:
                    yield line.rstrip("\n")
                    number += 1
        except UnicodeError as error:
            line = _line_of_error(self.path, self.encoding)
            raise PerPEFTError(
                f"{self.path}, line {line}: not {self.encoding} text ({getattr(error, 'reason', error)}); name its "
                "encoding by --encoding, for example --encoding cp1252"
            ) from None
        except (EOFError, gzip.BadGzipFile, OSError) as error:
            raise PerPEFTError(f"{self.path} is cut off or damaged after line {number:,} ({error})") from error

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """The number of the first line and the cells of each row after the header.

        A quotation mark opens a cell only if the cell also ends with one; otherwise it is a character like others.

        Raises:
            PerPEFTError: a quoted cell has no end and its line cannot be read without it; the message names the line.
        """
        rows = _records(self.lines(), self.separator, len(self.header), self.path)
        return itertools.islice(rows, 1 if self.has_header else 0, None)


def open_text(path: Path, separator: str | None, encoding: str | None, has_header: bool = True) -> TextFile:
    """Recognise a text file's form.

    Args:
        path: plain or gzip.
        separator, encoding: None recognises them.
        has_header: whether the first line names the columns.
    Raises:
        PerPEFTError: the file cannot be read, is empty, or names a column twice.
    """
    encoding = encoding or _encoding_of(path)
    try:
        with _open_text(path, encoding) as file:
            lines = list(itertools.islice(file, 50))
    except LookupError:
        raise PerPEFTError(f"--encoding {encoding[:40]}: no such encoding") from None
    except (UnicodeError, OSError, EOFError):
        lines = _first_lines(path, encoding)
    lines = [line.rstrip("\n") for line in lines if line.strip()]
    if not lines:
        raise PerPEFTError(f"{path} is empty")
    separator = separator or _separator_of(lines)
    header = _split(lines[0], separator)
    if not has_header:
        header = [str(place) for place in range(1, len(header) + 1)]
    while header and not header[-1]:  # a spreadsheet's empty columns
        header.pop()
    return TextFile(path, encoding, separator, header, has_header)


def _first_lines(path: Path, encoding: str) -> list[str]:
    with _open_bytes(path) as file:
        try:
            return file.read(SAMPLE).decode(encoding, errors="replace").splitlines(keepends=True)[:-1]
        except (OSError, EOFError) as error:
            raise PerPEFTError(f"{path} is cut off or damaged ({error})") from error


def _open_bytes(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"  # whatever the file's name
    return gzip.open(path) if packed else path.open("rb")


def _open_text(path: Path, encoding: str) -> TextIO:
    return io.TextIOWrapper(_open_bytes(path), encoding=encoding, newline=None)


def _encoding_of(path: Path) -> str:
    """UTF-8 unless the first bytes say otherwise."""
    try:
        with _open_bytes(path) as file:
            start = file.read(SAMPLE)
    except (OSError, EOFError) as error:
        raise PerPEFTError(f"{path} cannot be read ({error})") from error
    for mark, encoding in MARKS:
        if start.startswith(mark):
            return encoding
    for place, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if start[place::2].count(0) > len(start) // 8 and not start[1 - place :: 2].count(0):
            return encoding
    if b"\0" in start:
        raise PerPEFTError(f"{path} is not a text file; use CSV, TSV, JSON lines or Parquet")
    return "utf-8-sig"


def _line_of_error(path: Path, encoding: str) -> int:
    """The first line that cannot be decoded; lines are split as bytes, which holds for encodings that contain ASCII."""
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode(encoding)
            except UnicodeError:
                return number
    return 1


def _separator_of(lines: list[str]) -> str:
    """The separator that splits most of the first lines as it splits the header; of equal ones that of more columns."""
    header = lines[0]
    scores = []
    for separator in SEPARATORS:
        columns = len(_split(header, separator))
        if columns > 1:
            alike = sum(len(_split(line, separator)) == columns for line in lines)
            scores.append((alike / len(lines), columns, separator))
    return max(scores)[2] if scores else ","


def _split(line: str, separator: str) -> list[str]:
    """The cells of one line, without the space and the quotation marks around them."""
    if '"' not in line or len(separator) > 1:
        cells = line.split(separator)
    else:
        cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    return [_bare(cell) for cell in cells]


def _bare(cell: str) -> str:
    cell = cell.strip()
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', ""):
        cell = cell[1:-1].replace('""', '"').strip()
    return cell


def _records(lines: Iterable[str], separator: str, width: int, path: Path) -> Iterator[tuple[int, list[str]]]:
    waiting: collections.deque[str] = collections.deque()  # lines read ahead and given back
    source = iter(lines)

    def take() -> Iterator[str]:
        while True:
            if waiting:
                yield waiting.popleft()
            else:
                line = next(source, None)
                if line is None:
                    return
                yield line

    number = 1
    for line in take():
        if '"' not in line or len(separator) > 1:
            yield number, [_bare(cell) for cell in line.split(separator)]
            number += 1
            continue
        taken = [line]
        cells = _quoted(taken, take(), separator)
        plain = [_bare(cell) for cell in line.split(separator)]
        stray = _fits(plain, width) and all(_fits(other.split(separator), width) for other in taken[1:])
        if cells is None or (len(taken) > 1 and (stray or not _fits(cells, width))):
            if not _fits(plain, width):
                raise PerPEFTError(f"{path}, line {number}: a quotation mark opens a value and none ends it")
            waiting.extendleft(reversed(taken[1:]))
            yield number, plain
            number += 1
        else:
            yield number, [cell.strip() for cell in cells]
            number += len(taken)


def _fits(cells: list[str], width: int) -> bool:
    """Whether a row has as many cells as the header, apart from empty ones at the end."""
    return len(cells) >= width and not any(cells[width:])


def _quoted(taken: list[str], following: Iterator[str], separator: str) -> list[str] | None:
    """The cells of the quoted row that begins with the line in `taken`, which receives its other lines; None if it is none."""

    def feed() -> Iterator[str]:
        yield taken[0] + "\n"
        for line in itertools.islice(following, LONGEST_RECORD):
            taken.append(line)
            yield line + "\n"

    try:
        return next(csv.reader(feed(), delimiter=separator, strict=True, skipinitialspace=True), None)
    except csv.Error:
        return None


def is_plain(file: TextFile) -> bool:
    """Whether each line is a row as it stands in UTF-8: no quotation mark, no blank line, no character used between cells."""
    if file.encoding != "utf-8-sig":
        return False
    try:
        with _open_bytes(file.path) as content:
            while block := content.read(2**22) + content.readline():
                block.decode()
                if block[:1] in b"\r\n" or any(mark in block for mark in NOT_PLAIN) or block.count(b"\r") != block.count(b"\r\n"):
                    return False
    except (OSError, EOFError, UnicodeError):
        return False  # `lines` finds where
    return True


def write_rows(file: TextFile, places: list[int], target: Path) -> None:
    """Write a file's rows for DuckDB, a line each: number of the line, number of cells, and the cells at some places.

    Args:
        places: of the columns; the number of cells is 0 for a row in which all cells are empty.
    """
    with target.open("w", encoding="utf-8", errors="replace", newline="\n") as out:
        for number, cells in file.records():
            while len(cells) > len(file.header) and not cells[-1]:
                cells.pop()
            width = len(cells) if any(cells) else 0
            if width or len(file.header) > 1:
                chosen = [cells[place] if place < len(cells) else "" for place in places]
                text = CELL.join([str(number), str(width), *(_one_line(cell) for cell in chosen)])
                out.write(text + "\n")


def _one_line(cell: str) -> str:
    return cell.translate(ONE_LINE)
