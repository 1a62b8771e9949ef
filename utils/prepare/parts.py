"""How DuckDB reads a file of a table: a SELECT of rows of text; here for Parquet and text, for JSON in `json_files`."""
import glob
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from utils.prepare.lines import lines_sql
from utils.prepare.text_tables import CELL, NEWLINE, TextForm

BLANK, TOO_MANY, TOO_FEW = "blank", "more values than columns", "fewer values than columns"
NO_OBJECT = "not a JSON object with these fields"
PROBLEMS = (BLANK, TOO_MANY, TOO_FEW, NO_OBJECT)
SOURCE = "{source}"
NULL, NULL_TEXT = r"\N", "NULL"  # as databases write a missing value; the latter may also be an id


@dataclass(frozen=True)
class Part:
    """A file of a table, and two ways of reading it that return its rows in order, without their numbers.

    DuckDB reads with all cores only where nobody asks for the number of a row; it is found by counting where it is needed.

    Attributes:
        columns: the name of each role's column, None where there is none.
        fast: a SELECT of SOURCE, the file's text, for files without damage and odd lines; it raises for others.
        careful: a SELECT of SOURCE, the texts of `rows`.
        rows: the number of the line and the text of each row among the file's lines; None for a file that is no text.
        skipped: how many lines precede the first row, where from then on every line is a row to `fast`, else None.
    """

    path: Path
    columns: dict[str, str | None]
    fast: str
    careful: str
    rows: Callable[[Iterable[str]], Iterable[tuple[int, str]]] | None
    skipped: int | None


def quote(text: object) -> str:
    """A text as an SQL literal."""
    return "'" + str(text).replace("'", "''") + "'"


def name_sql(column: str) -> str:
    """A column's name as SQL."""
    return '"' + column.replace('"', '""') + '"'


def parquet_source(path: Path) -> str:
    """SQL of a Parquet file's rows."""
    return f"read_parquet({quote(glob.escape(str(path)))})"


def parquet_part(path: Path, columns: dict[str, str | None], types: dict[str, str]) -> Part:
    """A Parquet file, its columns by role, and the types of all."""
    texts = {role: "NULL::VARCHAR" if name is None else _parquet_text(name, types[name]) for role, name in columns.items()}
    roles = ", ".join(f"{text} AS {role}" for role, text in texts.items())
    select = f"SELECT NULL::VARCHAR AS problem, {roles} FROM {parquet_source(path)}"
    return Part(path, columns, select, select, rows=None, skipped=0)


def _parquet_text(name: str, kind: str) -> str:
    """SQL of a Parquet value as text: whole numbers without a fraction, lists and structures as JSON."""
    column = name_sql(name)
    if kind in ("DOUBLE", "FLOAT"):
        whole = f"{column} = trunc({column}) AND abs({column}) < 1e15"
        return f"CASE WHEN isnan({column}) THEN NULL WHEN {whole} THEN {column}::BIGINT::VARCHAR ELSE {column}::VARCHAR END"
    if kind == "BLOB":
        return f"try(decode({column}))"
    nested = kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION"))
    return f"to_json({column})::VARCHAR" if nested else trimmed(f"{column}::VARCHAR")


def text_part(form: TextForm, columns: dict[str, str | None], needed: list[str]) -> Part:
    """A text file of rows, its columns by role, and those that a row needs; without a quotation mark, each line is a row."""
    places = {role: form.header.index(name) + 1 for role, name in columns.items() if name is not None}
    nulls = {role: (NULL,) if role in ("user", "item") else (NULL, NULL_TEXT) for role in columns}
    values = {role: trimmed(f"cells[{place}]", *nulls[role]) for role, place in places.items()}
    roles = [f"{values.get(role, 'NULL')} AS {role}" for role in columns]
    problem = (
        f"CASE WHEN {trimmed('array_to_string(cells, chr(32))')} IS NULL THEN '{BLANK}' "
        f"WHEN {trimmed(f'array_to_string(cells[{len(form.header) + 1}:], chr(32))')} IS NOT NULL THEN '{TOO_MANY}' "
        f"WHEN len(cells) < {max(map(form.header.index, needed)) + 1} THEN '{TOO_FEW}' END"
    )
    plain = "CASE WHEN contains(line, '\"') THEN error('quotation marks') ELSE coalesce(line, '') END"
    fast = f"SELECT string_split({plain}, {quote(form.separator)}) AS cells FROM {lines_sql(SOURCE, form.header_line)}"
    careful = f"SELECT string_split(replace(line, '{NEWLINE}', chr(10)), '{CELL}') AS cells FROM {lines_sql(SOURCE)}"
    rows = f"SELECT {problem} AS problem, {', '.join(roles)} FROM"
    return Part(form.path, columns, f"{rows} ({fast})", f"{rows} ({careful})", form.one_line_rows, form.header_line)


def trimmed(text: str, *nulls: str) -> str:
    """SQL of a text without space around it; NULL where nothing or one of `nulls` is left."""
    spaced = f"starts_with({text}, ' ') OR ends_with({text}, ' ') OR contains({text}, chr(9))"  # `trim` takes long
    value = f"CASE WHEN {spaced} THEN trim({text}, ' \t') ELSE {text} END"
    for null in ("", *nulls):
        value = f"nullif({value}, {quote(null)})"
    return value
