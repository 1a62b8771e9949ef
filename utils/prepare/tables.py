"""A table in any usual format as a DuckDB relation whose columns are recognised by their names; every value is text."""

import contextlib
import glob
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from utils.common.errors import PerPEFTError
from utils.prepare.columns import TableOptions, recognise_columns
from utils.prepare.lines import LINES, lines_of
from utils.prepare.text_tables import CELL, NEWLINE, TextFile, is_plain, open_text, write_rows

BLANK, TOO_MANY, TOO_FEW, NO_OBJECT = (
    "blank",
    "more values than columns",
    "fewer values than columns",
    "not a JSON object with these fields",
)
PROBLEMS = (BLANK, TOO_MANY, TOO_FEW, NO_OBJECT)
SOURCE = "{source}"
FILE_BITS = 40  # a row's place is its file's number shifted by so many bits, plus its line


@dataclass
class Table:
    """A table opened.

    Attributes:
        files: the files it consists of.
        columns: the name of each role's column in the first file; None where there is none.
        parts: a SELECT for each file: place (BIGINT), problem (VARCHAR, NULL for a usable row), and each role (VARCHAR).
            Where it holds SOURCE, the file has to be opened by `lines_of` for it.
        encoding: of the files; None recognises it.
    """

    files: list[Path]
    columns: dict[str, str | None]
    parts: list[str]
    encoding: str | None = None

    @contextlib.contextmanager
    def rows(self) -> Iterator[str]:
        """A relation for one query: the rows of all files.

        Raises:
            PerPEFTError: when the block ends: a file is damaged, or not in its encoding.
        """
        with contextlib.ExitStack() as opened:
            selects = [
                part.replace(SOURCE, quote(opened.enter_context(lines_of(path, self.encoding)))) if SOURCE in part else part
                for path, part in zip(self.files, self.parts)
            ]
            yield f"({' UNION ALL '.join(selects)})"

    def where(self, place: int) -> str:
        """The line of a row, with its file where there are several."""
        line = f"line {place & (1 << FILE_BITS) - 1}"
        return line if len(self.files) == 1 else f"{self.files[place >> FILE_BITS].name} {line}"


def quote(text: object) -> str:
    """A text as an SQL literal."""
    return "'" + str(text).replace("'", "''") + "'"


def files_of(pattern: str | Path) -> list[Path]:
    """The files that a name or a pattern such as 'reviews_*.csv' stands for, in order.

    Raises:
        PerPEFTError: there is none.
    """
    files = (
        [Path(pattern)] if Path(pattern).exists() else [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]
    )
    files = [file for file in files if file.is_file()]
    if not files:
        raise PerPEFTError(f"{pattern}: no such file")
    return files


def open_table(
    con: duckdb.DuckDBPyConnection,
    pattern: str | Path,
    required: tuple[str, ...],
    optional: tuple[str, ...],
    options: TableOptions,
    scratch: Path,
) -> Table:
    """Recognise the format and the columns of a table.

    Args:
        con: the connection that will read it.
        pattern: a file, or several by a pattern.
        required, optional: the roles (keys of `columns.NAMES`) of the columns to read.
        options: what need not be recognised.
        scratch: a folder for what has to be rewritten before DuckDB reads it.
    Raises:
        PerPEFTError: a file cannot be read, a column is missing, named twice, or ambiguous.
    """
    table = Table(files_of(pattern), {}, [], options.encoding)
    for number, path in enumerate(table.files):
        rows = _open_rows(con, path, required, options, scratch)
        columns = recognise_columns(path, rows.header, required, optional, options)
        table.columns = table.columns or columns
        needed = [columns[role] for role in required]
        table.parts.append(_select(rows, number, columns, needed, Path(tempfile.mkstemp(".rows", dir=scratch)[1])))
    return table


@dataclass(frozen=True)
class _Rows:
    """A file whose rows DuckDB can number and take apart; `text` is None for Parquet and JSON."""

    path: Path
    kind: str  # text, json or parquet
    header: list[str]
    text: TextFile | None = None
    types: dict[str, str] = field(default_factory=dict)  # of Parquet's columns


def _open_rows(
    con: duckdb.DuckDBPyConnection, path: Path, required: tuple[str, ...], options: TableOptions, scratch: Path
) -> _Rows:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        try:
            described = con.execute(f"DESCRIBE SELECT * FROM read_parquet({quote(path)})").fetchall()
        except duckdb.Error as error:
            reason = str(error).splitlines()[0][:200]
            raise PerPEFTError(f"{path} is cut off or damaged, or no Parquet file ({reason})") from error
        return _Rows(path, "parquet", [row[0] for row in described], types={row[0]: row[1] for row in described})
    with lines_of(path, options.encoding) as source:
        lines = con.execute(f"SELECT line FROM {LINES % quote(source)} WHERE trim(line) <> '' LIMIT 1000").fetchall()
    if lines and lines[0][0].lstrip().startswith("{"):
        return _Rows(path, "json", _keys(line for (line,) in lines))
    numbered = all(options.columns.get(role, "").isdecimal() for role in required)
    text = open_text(path, options.separator, options.encoding, has_header=not numbered)
    return _Rows(path, "text", text.header, text)


def _keys(lines: Iterable[str]) -> list[str]:
    """All keys of the objects among some lines."""
    keys: dict[str, None] = {}
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            keys.update(dict.fromkeys(value) if isinstance(value, dict) else {})
    return list(keys)


def _parquet_text(name: str, kind: str) -> str:
    """SQL of a Parquet value as text: whole numbers without a fraction, lists and structures as JSON."""
    column = '"' + name.replace('"', '""') + '"'
    if kind in ("DOUBLE", "FLOAT"):
        whole = f"{column} = trunc({column}) AND abs({column}) < 1e15"
        return f"CASE WHEN isnan({column}) THEN NULL WHEN {whole} THEN {column}::BIGINT::VARCHAR ELSE {column}::VARCHAR END"
    if kind == "BLOB":
        return f"decode({column})"
    nested = kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION"))
    return f"to_json({column})::VARCHAR" if nested else f"{column}::VARCHAR"


def _select(rows: _Rows, number: int, columns: dict[str, str | None], needed: list[str], scratch: Path) -> str:
    """A SELECT of place, problem and each role of one file."""
    if rows.kind == "json":
        return select_json(number, {role: (name,) if name else () for role, name in columns.items()})
    if rows.kind == "parquet":
        roles = [
            f"{'NULL::VARCHAR' if name is None else _parquet_text(name, rows.types[name])} AS {role}"
            for role, name in columns.items()
        ]
        source = f"read_parquet({quote(rows.path)}, file_row_number=true)"
        return f"SELECT {number << FILE_BITS} + file_row_number + 1 AS place, NULL AS problem, {', '.join(roles)} FROM {source}"
    places = {role: rows.header.index(name) for role, name in columns.items() if name is not None}
    least = max(rows.header.index(name) for name in needed) + 1
    if is_plain(rows.text):
        separator, values = quote(rows.text.separator), {role: f"parts[{place + 1}]" for role, place in places.items()}
        source = (
            f"SELECT line, parts, CASE WHEN trim(replace(coalesce(text, ''), {separator}, ''), ' \t') = '' THEN 0 WHEN "
            f"trim(array_to_string(parts[{len(rows.header) + 1}:], ''), ' \t') = '' THEN least(len(parts), {len(rows.header)}) "
            f"ELSE len(parts) END AS width FROM (SELECT line, text, string_split(text, {separator}) AS parts FROM "
            f"(SELECT row_number() OVER () AS line, line AS text FROM {LINES % SOURCE})) WHERE line > {rows.text.header_line}"
        )
    else:
        write_rows(rows.text, list(places.values()), scratch)
        values = {role: f"replace(parts[{place + 3}], '{NEWLINE}', chr(10))" for place, role in enumerate(places)}
        source = (
            f"SELECT parts[1]::BIGINT AS line, parts, parts[2]::INTEGER AS width "
            f"FROM (SELECT string_split(line, '{CELL}') AS parts FROM {LINES % quote(scratch)})"
        )
    roles = [f"nullif(trim({values[role]}, ' \t'), '') AS {role}" if role in values else f"NULL AS {role}" for role in columns]
    problem = (
        f"CASE WHEN width = 0 THEN '{BLANK}' WHEN width > {len(rows.header)} THEN '{TOO_MANY}' "
        f"WHEN width < {least} THEN '{TOO_FEW}' END"
    )
    return f"SELECT {number << FILE_BITS} + line AS place, {problem} AS problem, {', '.join(roles)} FROM ({source})"


def select_json(number: int, keys: dict[str, tuple[str, ...]]) -> str:
    """A SELECT of place, problem and each role of the JSON lines file with a number; only the named keys are read.

    Args:
        keys: by role, the keys of which the first with a value counts; all values of the role "image" become one JSON list.
    """
    texts = [name for role, names in keys.items() if role != "image" for name in names]
    values = {role: [f"nullif(trim(texts[{texts.index(name) + 1}]), '')" for name in names]
              for role, names in keys.items() if role != "image"}  # fmt: skip
    roles = [f"coalesce({', '.join([*found, 'NULL'])}) AS {role}" for role, found in values.items()]
    columns = ["line", f"{_extract('json_extract_string', texts)} AS texts"]
    if "image" in keys:
        roles.append("to_json(images)::VARCHAR AS image")
        columns.append(f"{_extract('json_extract', keys['image'])} AS images" if keys["image"] else "NULL AS images")
    usable = f"coalesce({', '.join(f'texts[{place}]' for place in range(1, len(texts) + 1))})"
    # the line itself is looked at only where it has no value, and dropped before rows are numbered: both take long
    problem = f"CASE WHEN {usable} IS NOT NULL THEN NULL WHEN trim(coalesce(line, '')) = '' THEN '{BLANK}' ELSE '{NO_OBJECT}' END"
    rows = f"SELECT {problem} AS problem, {', '.join(roles)} FROM (SELECT {', '.join(columns)} FROM {LINES % SOURCE})"
    return f"SELECT {number << FILE_BITS} + row_number() OVER () AS place, * FROM ({rows})"


def _extract(function: str, keys: Sequence[str]) -> str:
    """SQL of the values of some keys of the JSON in `line`, as a list; a half surrogate pair, which is no text, is replaced."""
    paths = f"[{', '.join(quote(f'$.{json.dumps(key, ensure_ascii=False)}') for key in keys)}]"
    repaired = r"regexp_replace(line, '\\u[dD][89a-fA-F][0-9a-fA-F]{2}', '\\ufffd', 'g')"
    return f"coalesce(try({function}(line, {paths})), try({function}({repaired}, {paths})))"
