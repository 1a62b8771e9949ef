"""Rows of text files: separator, header and quotation marks, recognised from the first lines."""
import collections
import contextlib
import csv
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.common.errors import PerPEFTError

SEPARATORS = ("\t", ";", ",", "|", "::", "^", "~", " ")
CELL, NEWLINE = "\x1f", "\x1e"  # between the cells, and for line breaks within one, of the lines written for DuckDB
LONGEST_RECORD = 1000  # lines that a quoted cell may span
USUAL = 0.3  # share of the rows that begin with a shape which others may have, too
ONE_LINE = str.maketrans({CELL: " ", NEWLINE: " ", "\x01": " ", "\x02": " ", "\0": None, "\r": NEWLINE, "\n": NEWLINE})
csv.field_size_limit(2**27)


@dataclass(frozen=True)
class TextForm:
    """How a text file holds rows.

    Attributes:
        header: the names of the columns; "1", "2", ... where the file begins with a row.
        header_line: the number of the line that names the columns, 0 where none does.
        starts: the usual shapes of what rows begin with.
    """

    path: Path
    separator: str
    header: list[str]
    header_line: int
    starts: frozenset[str]

    def one_line_rows(self, lines: Iterable[str]) -> Iterator[tuple[int, str]]:
        """Each row of a file's lines after the header: the number of its first line, and its cells on one line, CELL between.

        A quotation mark opens a cell only if the cell also ends with one; otherwise it is a character like others.

        Raises:
            PerPEFTError: a quoted cell has no end and its line cannot be read without it; the message names the line.
        """
        waiting: collections.deque[str] = collections.deque()  # lines read ahead and returned
        source = iter(lines)

        def take() -> Iterator[str]:
            while (line := waiting.popleft() if waiting else next(source, None)) is not None:
                yield line

        number = 1
        for line in take():
            cells = plain = [_bare(cell) for cell in line.split(self.separator)]
            taken = [line]
            if '"' in line and len(self.separator) == 1:
                cells = self._escaped(line) or self._quoted(taken, take())
                if not self._is_row(cells, plain, taken):
                    if not self._fits(plain):
                        error = "a quotation mark opens a value and none ends it; remove it"
                        raise PerPEFTError(f"{self.path}, line {number}: {error}")
                    waiting.extendleft(reversed(taken[1:]))
                    cells, taken = plain, [line]
            if number > self.header_line:
                yield number, CELL.join(cell.strip().translate(ONE_LINE) for cell in cells)
            number += len(taken)

    def _is_row(self, cells: list[str] | None, plain: list[str], taken: list[str]) -> bool:
        """Whether quoted cells are a row; not so if each of its several lines looks like a row of its own."""
        if cells is None or len(taken) == 1:
            return cells is not None
        others = [line.split(self.separator) for line in taken[1:]]
        rows = self._fits(plain) and all(self._fits(other) and _shape(other[0]) in self.starts for other in others)
        return self._fits(cells) and not rows

    def _fits(self, cells: list[str]) -> bool:
        """Whether a row has as many cells as the header, apart from empty ones at the end."""
        return len(cells) >= len(self.header) and not any(cells[len(self.header) :])

    def _escaped(self, line: str) -> list[str] | None:
        """The cells of a line with quotation marks written as `\\"`; None if it is none."""
        cells = self._parsed([line], escapechar="\\", doublequote=False) if '\\"' in line else None
        return cells if cells and self._fits(cells) else None

    def _quoted(self, taken: list[str], following: Iterator[str]) -> list[str] | None:
        """The cells of the quoted row that begins with the line in `taken`, which receives its other lines; None if none."""

        def feed() -> Iterator[str]:
            yield taken[0] + "\n"
            for line in itertools.islice(following, LONGEST_RECORD):
                taken.append(line)
                yield line + "\n"

        return self._parsed(feed(), skipinitialspace=True)

    def _parsed(self, lines: Iterable[str], **quoting: Any) -> list[str] | None:
        with contextlib.suppress(csv.Error):
            return next(csv.reader(lines, delimiter=self.separator, strict=True, **quoting), None)


def recognise_form(path: Path, lines: list[str], separator: str | None, has_header: bool) -> TextForm:
    """How a file holds rows, by its first lines; a file without any is a PerPEFTError."""
    header_line = next((number for number, line in enumerate(lines) if line.strip()), None)
    if header_line is None:
        raise PerPEFTError(f"{path} is empty")
    if (declared := re.fullmatch("sep=(.)", lines[header_line])) and header_line + 1 < len(lines):  # a line for spreadsheets
        separator, header_line = separator or declared[1], header_line + 1
    lines = [line for line in lines[header_line:] if line.strip()]
    separator = separator or _separator_of(lines[:50])
    header = _split(lines[0], separator)
    if not has_header:
        header_line -= 1
        header = [str(place) for place in range(1, len(header) + 1)]
    while header and not header[-1]:  # a spreadsheet's empty columns
        header.pop()
    shapes = collections.Counter(_shape(line.split(separator)[0]) for line in lines[1:])
    starts = frozenset(shape for shape, count in shapes.items() if count >= USUAL * shapes.total())
    return TextForm(path, separator, header, header_line + 1, starts)


def _shape(cell: str) -> str:
    """A cell with each word that holds a digit as 9 and each other as a: ids differ so from words of a title."""
    return re.sub(r"\w+", lambda word: "9" if re.search(r"\d", word[0]) else "a", cell.strip(' "'))


def _separator_of(lines: list[str]) -> str:
    """The separator that splits most of the first lines as it splits the header; of equal ones that of more columns."""
    scores = [(0, 0, ",")]
    for separator in SEPARATORS:
        columns, *others = [len(_split(line, separator)) for line in lines]
        if columns > 1:
            scores.append((others.count(columns), columns, separator))
    return max(scores)[2]


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
