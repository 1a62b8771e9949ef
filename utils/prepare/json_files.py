"""Files of JSON: lines, Python's dicts as lines, and documents of one value."""
import contextlib
import itertools
import json
import re
from ast import literal_eval
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from utils.common.errors import PerPEFTError
from utils.prepare.lines import LONGEST_LINE, lines_sql, text_lines
from utils.prepare.parts import NO_OBJECT, SOURCE, Part, name_sql, quote, trimmed

ARRAY = re.compile(r"\s*\[\s*[{\[\]]")
SPACE = re.compile(r"\s*")
START = 1000  # lines within which a document's first object begins


def is_document(start: str) -> bool:
    """Whether a JSON file that begins so is read as a whole: an array, objects over several lines, or one object of columns."""
    lines = start.lstrip().split("\n", 2)
    if ARRAY.match(start) or lines[0].strip() == "{":
        return True
    try:
        value = json.loads(lines[0]) if not "".join(lines[1:]).strip() else None
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(value) and all(isinstance(entry, (dict, list)) for entry in value.values())


def _document_rows(text: str) -> list:
    """The objects of a JSON document: of an array, one after the other, or in one of the forms of pandas' `to_json`."""
    values, place = [], 0
    text, decoder = text.strip(), json.JSONDecoder()
    while place < len(text):
        value, place = decoder.raw_decode(text, SPACE.match(text, place).end())
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

    Python dicts, as in the release of 2014, become JSON; lines that are neither stay. What begins as a document and is none
    is a PerPEFTError.
    """
    lines = iter(lines)
    head = list(itertools.islice(lines, START))
    lines = itertools.chain(head, lines)
    if is_document("\n".join(head)):
        try:
            yield from enumerate(map(json.dumps, _document_rows("\n".join(lines))), 1)
        except (ValueError, TypeError, RecursionError) as error:
            raise PerPEFTError(f"neither a JSON array nor JSON lines ({error})") from error
        return
    for number, line in enumerate(lines, 1):
        if line.startswith("{'"):
            with contextlib.suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                line = json.dumps(literal_eval(line))
        if line and not line.isspace():
            yield number, line


def json_part(path: Path, keys: dict[str, tuple[str, ...]], whole: bool = False) -> Part:
    """A file of JSON, which is lines unless it is a `whole` document; only the named keys are read.

    Of a role's keys, the first with a value counts; all values of the role "image" become one JSON list.
    """
    texts = [name for role, names in keys.items() if role != "image" for name in names]
    images = keys.get("image", ())

    def select(values: dict[str, str], image: str, source: str) -> str:
        cells = {name: _json_text(value) for name, value in values.items()}
        found = {role: ", ".join([*map(cells.get, names), "NULL"]) for role, names in keys.items() if role != "image"}
        roles = [f"coalesce({alternatives}) AS {role}" for role, alternatives in found.items()]
        roles += [f"to_json({image})::VARCHAR AS image"] if "image" in keys else []
        problem = f"CASE WHEN coalesce({', '.join(values.values())}, NULL) IS NULL THEN '{NO_OBJECT}' END"
        return f"SELECT {problem} AS problem, {', '.join(roles)} FROM {source}"

    types = [f"{quote(name)}: 'VARCHAR'" for name in texts] + [f"{quote(name)}: 'JSON'" for name in images]
    options = f"format='newline_delimited', maximum_object_size={LONGEST_LINE}, compression='none'"
    fast = select(
        {name: name_sql(name) for name in texts}, f"[{', '.join(map(name_sql, images))}]::JSON[]",
        f"read_json({SOURCE}, columns={{{', '.join(types)}}}, {options})",
    )  # fmt: skip
    extracted = f"{_extract('json_extract_string', texts)} AS texts, {_extract('json_extract', images)} AS images"
    places = {name: f"texts[{place}]" for place, name in enumerate(texts, 1)}
    careful = select(places, "images", f"(SELECT {extracted} FROM {lines_sql(SOURCE)})")
    columns = {role: "/".join(names) or None for role, names in keys.items()}
    return Part(path, columns, "SELECT error('a document')" if whole else fast, careful, json_rows, skipped=None)


def _json_text(value: str) -> str:
    """SQL of a JSON value as text: NULL for NaN, and what MongoDB's exports wrap in an object."""
    paths = ("$oid", "$numberLong", "$numberInt", "$numberDouble", "$uuid", '$date"."$numberLong', "$date")
    wrapped = ", ".join(f"json_extract_string({value}, '$.\"{path}\"')" for path in paths)
    text = f"CASE WHEN starts_with({value}, '{{\"$') THEN coalesce({wrapped}, {value}) ELSE {value} END"
    return trimmed(text, "NaN")


def _extract(function: str, keys: Sequence[str]) -> str:
    """SQL of the values of some keys of the JSON in `line`, as a list; a half surrogate pair, which is no text, is replaced."""
    paths = f"[{', '.join(quote(f'$.{json.dumps(key, ensure_ascii=False)}') for key in keys)}]::VARCHAR[]"
    repaired = r"regexp_replace(line, '\\u[dD][89a-fA-F][0-9a-fA-F]{2}', '\\ufffd', 'g')"
    return f"coalesce(try({function}(line, {paths})), try({function}({repaired}, {paths})))"


def json_keys(files: Iterable[Path], encoding: str | None, first: int | None = None) -> list[str]:
    """All keys of the first objects of each JSON file, or of all its objects, which takes as long as reading it in Python."""
    keys: dict[str, None] = {}
    for path in files:
        for _, text in itertools.islice(json_rows(text_lines(path, encoding)), first):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(text)
                keys.update(dict.fromkeys(value) if isinstance(value, dict) else {})
    return list(keys)
