"""Text files of rows: compression, encoding, separator and quotation marks, recognised before anything is read."""

import collections
import contextlib
import csv
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from utils.common.errors import PerPEFTError
from utils.prepare.lines import is_damage, recognise_encoding, unpacked

SAMPLE, SAMPLE_LINES = 2**16, 50  # bytes by which the encoding is recognised, lines for the separator
SEPARATORS = ("\t", ";", ",", "|", "::", "^", "~", " ")
CELL, NEWLINE = "\x1f", "\x1e"  # between the cells, and for line breaks within one, of the files written for DuckDB
LONGEST_RECORD = 1000  # lines that a quoted cell may span
ONE_LINE = str.maketrans({CELL: " ", NEWLINE: " ", "\x01": " ", "\x02": " ", "\0": None, "\r": NEWLINE, "\n": NEWLINE})
csv.field_size_limit(2**27)


@dataclass(frozen=True)
class TextFile:
    """A text file's form.

    Attributes:
        path: of the file.
        encoding, separator: as Python names them.
        header: the names of the columns; "1", "2", ... where the file begins with a row.
        header_line: the number of the line that names the columns, 0 where none does.
    """

    path: Path
    encoding: str
    separator: str
    header: list[str]
    header_line: int = 1

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
        except Exception as error:
            if not is_damage(error):
                raise
            raise PerPEFTError(f"{self.path} is cut off or damaged after line {number:,} ({error})") from error

    def records(self) -> Iterator[tuple[int, list[str]]]:
        """The number of the first line and the cells of each row after the header.

        A quotation mark opens a cell only if the cell also ends with one; otherwise it is a character like others.

        Raises:
            PerPEFTError: a quoted cell has no end and its line cannot be read without it; the message names the line.
        """
        rows = _records(self.lines(), self.separator, len(self.header), self.path)
        return (row for row in rows if row[0] > self.header_line)


def open_text(path: Path, separator: str | None, encoding: str | None, has_header: bool = True) -> TextFile:
    """Recognise a text file's form.

    Args:
        path: may be compressed.
        separator, encoding: None recognises them.
        has_header: whether the first line names the columns.
    Raises:
        PerPEFTError: the file cannot be read, is empty, or names a column twice.
    """
    with _open_bytes(path) as file:
        encoding = encoding or recognise_encoding(file.read(SAMPLE), path)
    with _open_text(path, encoding) as file:
        lines = [line.rstrip("\n") for line in itertools.islice(file, SAMPLE_LINES)]
    header_line = next((number for number, line in enumerate(lines) if line.strip()), None)
    if header_line is None:
        raise PerPEFTError(f"{path} is empty")
    if (declared := re.fullmatch("sep=(.)", lines[header_line])) and header_line + 1 < len(lines):  # a line for spreadsheets
        separator, header_line = separator or declared[1], header_line + 1
    lines = [line for line in lines[header_line:] if line.strip()]
    separator = separator or _separator_of(lines)
    header = _split(lines[0], separator)
    if not has_header:
        header_line -= 1
        header = [str(place) for place in range(1, len(header) + 1)]
    while header and not header[-1]:  # a spreadsheet's empty columns
        header.pop()
    return TextFile(path, encoding, separator, header, header_line + 1)


@contextlib.contextmanager
def _open_bytes(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        yield unpacked(file)


@contextlib.contextmanager
def _open_text(path: Path, encoding: str) -> Iterator[TextIO]:
    with _open_bytes(path) as file:
        yield io.TextIOWrapper(file, encoding=encoding, newline=None)


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
        cells = _escaped(line, separator, width) or _quoted(taken, take(), separator)
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


def _escaped(line: str, separator: str, width: int) -> list[str] | None:
    """The cells of a line with quotation marks written as `\\"`; None if it is none."""
    if '\\"' not in line:
        return None
    try:
        cells = next(csv.reader([line], delimiter=separator, escapechar="\\", doublequote=False, strict=True))
    except csv.Error:
        return None
    return cells if _fits(cells, width) else None


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
    """Whether each line is a row as it stands, since the file holds no quotation mark."""
    try:
        with _open_bytes(file.path) as content:
            return all(b'"' not in block for block in iter(lambda: content.read(2**22), b""))
    except Exception as error:
        if not is_damage(error):
            raise
        return False  # `lines` finds where


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
