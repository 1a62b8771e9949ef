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
from utils.prepare.lines import LONGEST_LINE, lines_sql
from utils.prepare.text_tables import CELL, NEWLINE, TextForm

BLANK, TOO_MANY, TOO_FEW, NO_OBJECT = (
    "blank",
    "more values than columns",
    "fewer values than columns",
    "not a JSON object with these fields",
)
PROBLEMS = (BLANK, TOO_MANY, TOO_FEW, NO_OBJECT)
SOURCE = "{source}"
ARRAY = re.compile(r"\s*\[\s*[{\[\]]")
START = 1000  # lines within which the first object of a JSON document begins
NULL, NULL_TEXT = r"\N", "NULL"  # as databases write a missing value; the latter may also be an id


@dataclass(frozen=True)
class Part:
    """A file of a table, and two ways of reading it that return its rows in order, without their numbers.

    DuckDB reads with all cores only where nobody asks for the number of a row; it is found by counting where it is needed.

    Attributes:
        path: of the file.
        fast: a SELECT of SOURCE, the file's text, for files without damage and odd lines; it raises for others.
        careful: a SELECT of SOURCE, the texts of `rows`.
        rows: the number of the line and the text of each row among the file's lines; None for a file that is no text.
        skipped: how many lines precede the first row, where from then on every line is a row to `fast`, else None.
    """

    path: Path
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
    """A Parquet file.

    Args:
        columns: by role, the name of its column or None.
        types: of all columns.
    """
    texts = {role: "NULL::VARCHAR" if name is None else _parquet_text(name, types[name]) for role, name in columns.items()}
    roles = [f"{text} AS {role}" for role, text in texts.items()]
    select = f"SELECT NULL AS problem, {', '.join(roles)} FROM {parquet_source(path)}"
    return Part(path, select, select, rows=None, skipped=0)


def _parquet_text(name: str, kind: str) -> str:
    """SQL of a Parquet value as text: whole numbers without a fraction, lists and structures as JSON."""
    column = name_sql(name)
    if kind in ("DOUBLE", "FLOAT"):
        whole = f"{column} = trunc({column}) AND abs({column}) < 1e15"
        return f"CASE WHEN isnan({column}) THEN NULL WHEN {whole} THEN {column}::BIGINT::VARCHAR ELSE {column}::VARCHAR END"
    if kind == "BLOB":
        return f"try(decode({column}))"
    nested = kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION"))
    return f"to_json({column})::VARCHAR" if nested else _trimmed(f"{column}::VARCHAR")


def text_part(form: TextForm, columns: dict[str, str | None], needed: list[str]) -> Part:
    """A text file of rows; without a quotation mark, each line is a row as it stands.

    Args:
        columns: by role, the name of its column or None.
        needed: names of the columns without which a row cannot be used.
    """
    places = {role: form.header.index(name) + 1 for role, name in columns.items() if name is not None}
    nulls = {role: (NULL,) if role in ("user", "item") else (NULL, NULL_TEXT) for role in columns}
    values = {role: _trimmed(f"cells[{place}]", *nulls[role]) for role, place in places.items()}
    roles = [f"{values.get(role, 'NULL')} AS {role}" for role in columns]
    problem = (
        f"CASE WHEN {_trimmed('array_to_string(cells, chr(32))')} IS NULL THEN '{BLANK}' "
        f"WHEN {_trimmed(f'array_to_string(cells[{len(form.header) + 1}:], chr(32))')} IS NOT NULL THEN '{TOO_MANY}' "
        f"WHEN len(cells) < {max(map(form.header.index, needed)) + 1} THEN '{TOO_FEW}' END"
    )
    plain = "CASE WHEN contains(line, '\"') THEN error('quotation marks') ELSE coalesce(line, '') END"
    fast = f"SELECT string_split({plain}, {quote(form.separator)}) AS cells FROM {lines_sql(SOURCE, form.header_line)}"
    careful = f"SELECT string_split(replace(line, '{NEWLINE}', chr(10)), '{CELL}') AS cells FROM {lines_sql(SOURCE)}"
    rows = f"SELECT {problem} AS problem, {', '.join(roles)} FROM"
    return Part(form.path, f"{rows} ({fast})", f"{rows} ({careful})", form.one_line_rows, form.header_line)


def _trimmed(text: str, *nulls: str) -> str:
    """SQL of a text without space around it; NULL where nothing or one of `nulls` is left."""
    spaced = f"starts_with({text}, ' ') OR ends_with({text}, ' ') OR contains({text}, chr(9))"  # `trim` takes long
    value = f"CASE WHEN {spaced} THEN trim({text}, ' \t') ELSE {text} END"
    for null in ("", *nulls):
        value = f"nullif({value}, {quote(null)})"
    return value


def is_document(start: str) -> bool:
    """Whether a JSON file that begins so is read as a whole: an array, objects over several lines, or one object of columns."""
    lines = start.split("\n", 2)
    if ARRAY.match(start) or lines[0].strip() == "{":
        return True
    try:
        value = json.loads(lines[0]) if not "".join(lines[1:]).strip() else None
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value) and all(isinstance(entry, (dict, list)) for entry in value.values())


def _document_rows(text: str) -> list:
    """The objects of a JSON document: of an array, one after the other, or in one of the forms of pandas' `to_json`.

    Raises:
        ValueError: it is none.
    """
    values, place = [], 0
    while rest := text[place:].lstrip():
        place = len(text) - len(rest)
        value, place = json.JSONDecoder().raw_decode(text, place)
        values.append(value)
    document = values[0] if len(values) == 1 else values
    if isinstance(document, dict) and document.keys() == {"columns", "index", "data"}:
        return [dict(zip(document["columns"], row)) for row in document["data"]]
    if isinstance(document, dict) and all(isinstance(entry, (dict, list)) for entry in document.values()):
        arrays = [entry for entry in document.values() if isinstance(entry, list) and entry and isinstance(entry[0], dict)]
        if len(arrays) == 1:
            return arrays[0]
        columns = {name: entry if isinstance(entry, dict) else dict(enumerate(entry)) for name, entry in document.items()}
        rows = dict.fromkeys(row for column in columns.values() for row in column)
        return [{name: column.get(row) for name, column in columns.items()} for row in rows]
    return document if isinstance(document, list) else values


def json_rows(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The numbers and the JSON of the lines that are not blank, or of the objects of a document.

    Python dicts, as in the release of 2014, become JSON; lines that are neither stay.

    Raises:
        PerPEFTError: what begins as a document is none.
    """
    lines = itertools.dropwhile(lambda line: not line[1].strip(), enumerate(lines, 1))
    head = list(itertools.islice(lines, START))
    lines = itertools.chain(head, lines)
    if is_document("\n".join(line for _, line in head)):
        try:
            yield from enumerate(map(json.dumps, _document_rows("\n".join(line for _, line in lines))), 1)
        except (ValueError, TypeError, RecursionError) as error:
            raise PerPEFTError(f"neither a JSON array nor JSON lines ({error})") from error
    for number, line in lines:
        if line.startswith("{'"):
            with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                line = json.dumps(literal_eval(line))
        if line and not line.isspace():
            yield number, line


def json_part(path: Path, keys: dict[str, tuple[str, ...]], whole: bool = False) -> Part:
    """A file of JSON; only the named keys are read.

    Args:
        path: of the file.
        keys: by role, the keys of which the first with a value counts; all values of the role "image" become one JSON list.
        whole: whether the file is a document and not lines.
    """
    texts = [name for role, names in keys.items() if role != "image" for name in names]
    images = list(keys.get("image", ()))

    def select(values: list[str], image: str, source: str) -> str:
        trimmed = dict(zip(texts, map(_json_text, values)))
        lists = {role: ", ".join([*map(trimmed.get, names), "NULL"]) for role, names in keys.items() if role != "image"}
        found = {role: f"coalesce({values})" for role, values in lists.items()}
        found |= {"image": f"to_json({image})::VARCHAR"} if "image" in keys else {}
        roles = ", ".join(f"{value} AS {role}" for role, value in found.items())
        problem = f"CASE WHEN coalesce({', '.join(values)}, NULL) IS NULL THEN '{NO_OBJECT}' END"
        return f"SELECT {problem} AS problem, {roles} FROM {source}"

    columns = [f"{quote(name)}: 'VARCHAR'" for name in texts] + [f"{quote(name)}: 'JSON'" for name in images]
    options = f"format='newline_delimited', maximum_object_size={LONGEST_LINE}, compression='none'"
    fast = select(
        list(map(name_sql, texts)), f"[{', '.join(map(name_sql, images))}]::JSON[]",
        f"read_json({SOURCE}, columns={{{', '.join(columns)}}}, {options})",
    )  # fmt: skip
    extracted = f"{_extract('json_extract_string', texts)} AS texts, {_extract('json_extract', images)} AS images"
    places = range(1, len(texts) + 1)
    careful = select([f"texts[{place}]" for place in places], "images", f"(SELECT {extracted} FROM {lines_sql(SOURCE)})")
    return Part(path, "SELECT error('a document')" if whole else fast, careful, json_rows, skipped=None)


def _json_text(value: str) -> str:
    """SQL of a JSON value as text: NULL for NaN, and what MongoDB's exports wrap in an object."""
    paths = ("$oid", "$numberLong", "$numberInt", "$numberDouble", "$uuid", '$date"."$numberLong', "$date")
    wrapped = ", ".join(f"json_extract_string({value}, '$.\"{path}\"')" for path in paths)
    text = f"CASE WHEN starts_with({value}, '{{\"$') THEN coalesce({wrapped}, {value}) ELSE {value} END"
    return _trimmed(text, "NaN")


def _extract(function: str, keys: Sequence[str]) -> str:
    """SQL of the values of some keys of the JSON in `line`, as a list; a half surrogate pair, which is no text, is replaced."""
    paths = f"[{', '.join(quote(f'$.{json.dumps(key, ensure_ascii=False)}') for key in keys)}]::VARCHAR[]"
    repaired = r"regexp_replace(line, '\\u[dD][89a-fA-F][0-9a-fA-F]{2}', '\\ufffd', 'g')"
    return f"coalesce(try({function}(line, {paths})), try({function}({repaired}, {paths})))"
