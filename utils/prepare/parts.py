"""How DuckDB reads a file of a table: a SELECT of rows of text for each format."""

import contextlib
import glob
import itertools
import json
import re
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.common.errors import PerPEFTError
from utils.prepare.lines import LINES, LONGEST_LINE
from utils.prepare.text_tables import CELL, NEWLINE, TextForm

BLANK, TOO_MANY, TOO_FEW, NO_OBJECT = (
    "blank",
    "more values than columns",
    "fewer values than columns",
    "not a JSON object with these fields",
)
PROBLEMS = (BLANK, TOO_MANY, TOO_FEW, NO_OBJECT)
SOURCE = "{source}"
FILE_BITS = 40  # a row's place is its file's number shifted by so many bits, plus its line
ARRAY = re.compile(r"\s*\[\s*[{\]]")
ARRAY_START = 1000  # lines within which an array's first object begins


@dataclass(frozen=True)
class Part:
    """A file of a table, and two ways of reading it.

    Attributes:
        path: of the file.
        fast: a SELECT of SOURCE, the file's text, for files without damage and odd lines; it raises for others.
        careful: a SELECT of SOURCE, the file's lines after `prepare_lines`.
        prepare_lines: makes the lines that `careful` reads of the file's.
        skips_blank: whether `fast` does not count blank lines.
    """

    path: Path
    fast: str
    careful: str
    prepare_lines: Callable[[Iterable[str]], Iterable[str]] = iter
    skips_blank: bool = False


def quote(text: object) -> str:
    """A text as an SQL literal."""
    return "'" + str(text).replace("'", "''") + "'"


def name_sql(column: str) -> str:
    """A column's name as SQL."""
    return '"' + column.replace('"', '""') + '"'


def parquet_source(path: Path) -> str:
    """SQL of a Parquet file's rows."""
    return f"read_parquet({quote(glob.escape(str(path)))}, file_row_number=true)"


def parquet_part(number: int, path: Path, columns: dict[str, str | None], types: dict[str, str]) -> Part:
    """A Parquet file.

    Args:
        number: of the file in its table.
        columns: by role, the name of its column or None.
        types: of all columns.
    """
    texts = {role: "NULL::VARCHAR" if name is None else _parquet_text(name, types[name]) for role, name in columns.items()}
    roles = [f"{text} AS {role}" for role, text in texts.items()]
    place = f"{number << FILE_BITS} + file_row_number + 1 AS place"
    select = f"SELECT {place}, NULL AS problem, {', '.join(roles)} FROM {parquet_source(path)}"
    return Part(path, select, select)


def _parquet_text(name: str, kind: str) -> str:
    """SQL of a Parquet value as text: whole numbers without a fraction, lists and structures as JSON."""
    column = name_sql(name)
    if kind in ("DOUBLE", "FLOAT"):
        whole = f"{column} = trunc({column}) AND abs({column}) < 1e15"
        return f"CASE WHEN isnan({column}) THEN NULL WHEN {whole} THEN {column}::BIGINT::VARCHAR ELSE {column}::VARCHAR END"
    if kind == "BLOB":
        return f"decode({column})"
    nested = kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION"))
    return f"to_json({column})::VARCHAR" if nested else f"{column}::VARCHAR"


def text_part(number: int, form: TextForm, columns: dict[str, str | None], needed: list[str]) -> Part:
    """A text file of rows; without a quotation mark, each line is a row as it stands.

    Args:
        number: of the file in its table.
        columns: by role, the name of its column or None.
        needed: names of the columns without which a row cannot be used.
    """
    places = {role: form.header.index(name) + 1 for role, name in columns.items() if name is not None}
    roles = [f"{_trimmed(f'cells[{places[role]}]') if role in places else 'NULL'} AS {role}" for role in columns]
    problem = (
        f"CASE WHEN {_trimmed('array_to_string(cells, chr(32))')} IS NULL THEN '{BLANK}' "
        f"WHEN {_trimmed(f'array_to_string(cells[{len(form.header) + 1}:], chr(32))')} IS NOT NULL THEN '{TOO_MANY}' "
        f"WHEN len(cells) < {max(map(form.header.index, needed)) + 1} THEN '{TOO_FEW}' END"
    )
    plain = "CASE WHEN contains(line, '\"') THEN error('quotation marks') ELSE coalesce(line, '') END"
    fast = f"SELECT row_number() OVER () AS line, string_split({plain}, {quote(form.separator)}) AS cells FROM {LINES % SOURCE}"
    careful = (
        "SELECT cells[1]::BIGINT AS line, cells[2:] AS cells "
        f"FROM (SELECT string_split(replace(line, '{NEWLINE}', chr(10)), '{CELL}') AS cells FROM {LINES % SOURCE})"
    )
    rows = f"SELECT {number << FILE_BITS} + line AS place, {problem} AS problem, {', '.join(roles)} FROM (%s)"
    rows += f" WHERE line > {form.header_line}"
    return Part(form.path, rows.replace("%s", fast), rows.replace("%s", careful), form.one_line_rows)


def _trimmed(text: str) -> str:
    """SQL of a text without space around it; NULL where nothing is left. `trim` takes long, so it is only called where needed."""
    spaced = f"starts_with({text}, ' ') OR ends_with({text}, ' ') OR contains({text}, chr(9))"
    return f"nullif(CASE WHEN {spaced} THEN trim({text}, ' \t') ELSE {text} END, '')"


def json_lines(lines: Iterable[str]) -> Iterator[str]:
    """JSON lines of JSON lines, of a JSON array, or of Python dicts as in the release of 2014; other lines as they are.

    Raises:
        PerPEFTError: what begins as an array is none.
    """
    lines = iter(lines)
    head = list(itertools.islice(lines, ARRAY_START))
    lines = itertools.chain(head, lines)
    if ARRAY.match("\n".join(head)):
        try:
            yield from map(json.dumps, json.loads("\n".join(lines)))
        except (ValueError, RecursionError) as error:
            raise PerPEFTError(f"neither a JSON array nor JSON lines ({error})") from error
    for line in lines:
        if line.startswith("{'"):
            with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                line = json.dumps(literal_eval(line))
        yield line


def json_part(number: int, path: Path, keys: dict[str, tuple[str, ...]]) -> Part:
    """A file of JSON lines; only the named keys are read.

    Args:
        number: of the file in its table.
        path: of the file.
        keys: by role, the keys of which the first with a value counts; all values of the role "image" become one JSON list.
    """
    texts = [name for role, names in keys.items() if role != "image" for name in names]
    images = list(keys.get("image", ()))

    def select(values: list[str], image: str, is_blank: str, source: str) -> str:
        trimmed = dict(zip(texts, map(_trimmed, values)))
        lists = {role: ", ".join([*map(trimmed.get, names), "NULL"]) for role, names in keys.items() if role != "image"}
        found = {role: f"coalesce({values})" for role, values in lists.items()}
        found |= {"image": f"to_json({image})::VARCHAR"} if "image" in keys else {}
        roles = ", ".join(f"{value} AS {role}" for role, value in found.items())
        usable = f"coalesce({', '.join(values)}, NULL) IS NOT NULL"
        # the line itself is used only where it has no value, and dropped before rows are numbered: both take long
        problem = f"CASE WHEN {usable} THEN NULL WHEN {is_blank} THEN '{BLANK}' ELSE '{NO_OBJECT}' END"
        rows = f"SELECT {problem} AS problem, {roles} FROM {source}"
        return f"SELECT {number << FILE_BITS} + row_number() OVER () AS place, * FROM ({rows})"

    columns = [f"{quote(name)}: 'VARCHAR'" for name in texts] + [f"{quote(name)}: 'JSON'" for name in images]
    options = f"format='newline_delimited', maximum_object_size={LONGEST_LINE}, compression='none'"
    fast = select(
        list(map(name_sql, texts)), f"[{', '.join(map(name_sql, images))}]::JSON[]", "false",
        f"read_json({SOURCE}, columns={{{', '.join(columns)}}}, {options})",
    )  # fmt: skip
    extracted = f"{_extract('json_extract_string', texts)} AS texts, {_extract('json_extract', images)} AS images"
    careful = select(
        [f"texts[{place}]" for place in range(1, len(texts) + 1)], "images", "trim(coalesce(line, '')) = ''",
        f"(SELECT line, {extracted} FROM {LINES % SOURCE})",
    )  # fmt: skip
    return Part(path, fast, careful, json_lines, skips_blank=True)


def _extract(function: str, keys: Sequence[str]) -> str:
    """SQL of the values of some keys of the JSON in `line`, as a list; a half surrogate pair, which is no text, is replaced."""
    paths = f"[{', '.join(quote(f'$.{json.dumps(key, ensure_ascii=False)}') for key in keys)}]::VARCHAR[]"
    repaired = r"regexp_replace(line, '\\u[dD][89a-fA-F][0-9a-fA-F]{2}', '\\ufffd', 'g')"
    return f"coalesce(try({function}(line, {paths})), try({function}({repaired}, {paths})))"
