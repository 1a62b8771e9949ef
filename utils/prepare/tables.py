"""A table in any usual format as a DuckDB relation whose columns are recognised by their names; every value is text."""

import argparse
import glob
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from utils.common.errors import PerPEFTError
from utils.prepare.text_tables import CELL, NEWLINE, TextFile, is_plain, open_text, write_rows

ZSTD = b"\x28\xb5\x2f\xfd"  # what such a file begins with
BLANK, TOO_MANY, TOO_FEW, NO_OBJECT = (
    "blank",
    "more values than columns",
    "fewer values than columns",
    "not a JSON object with these fields",
)
PROBLEMS = (BLANK, TOO_MANY, TOO_FEW, NO_OBJECT)
FILE_BITS = 40  # a row's place is its file's number shifted by so many bits, plus its line
LONGEST_LINE = 2**24  # bytes of a line, of which DuckDB holds a few at once
NAMES = {  # usual names of each column, lower case, without "_", " ", "-"; the first that is there is chosen
    "user": ("user", "userid", "reviewerid", "customer", "customerid", "visitorid", "sessionid", "uid"),
    "item": ("item", "itemid", "parentasin", "asin", "movieid", "product", "productid", "articleid", "sku", "iid", "id"),
    "time": ("time", "timestamp", "date", "datetime", "unixreviewtime", "createdat", "eventtime"),
    "rating": ("rating", "overall", "stars", "score"),
    "title": ("title", "name", "itemname", "productname", "producttitle"),
    "image": (
        "image",
        "images",
        "imagepath",
        "imageurl",
        "poster",
        "posterpath",
        "posterurl",
        "img",
        "imgurl",
        "imurl",
        "picture",
    ),
}


@dataclass(frozen=True)
class TableOptions:
    """How a table is to be read where that is not to be recognised.

    Attributes:
        separator, encoding, time_format: None recognises them.
        columns: names of columns by role; a number counts the columns of a table without a header.
    """

    separator: str | None = None
    encoding: str | None = None
    time_format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """The options that `table_options_of` reads."""
    group = parser.add_argument_group("how the tables are written (recognised where not given)")
    group.add_argument("--separator", default=None, help="between the columns, for example ';' or '\\t'")
    group.add_argument("--encoding", default=None, help="of the text, for example latin-1")
    group.add_argument("--time_format", default=None, help="of dates, for example '%%d.%%m.%%Y %%H:%%M'")
    for role in NAMES:
        group.add_argument(
            f"--{role}_column",
            default=None,
            metavar="NAME",
            help=f"column of the {role}; a number where no header names it",
        )


def table_options_of(options: argparse.Namespace) -> TableOptions:
    """What the options say."""
    columns = {role: getattr(options, f"{role}_column") for role in NAMES}
    separator = options.separator and options.separator.replace("\\t", "\t")
    chosen = {role: name for role, name in columns.items() if name is not None}
    return TableOptions(separator, options.encoding, options.time_format, chosen)


@dataclass
class Table:
    """A table opened.

    Attributes:
        files: the files it consists of.
        columns: the name of each role's column in the first file; None where there is none.
        relation: a SELECT of place (BIGINT), problem (VARCHAR, NULL for a usable row), and each role (VARCHAR).
    """

    files: list[Path]
    columns: dict[str, str | None]
    relation: str

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
        required, optional: the roles (keys of NAMES) of the columns to read.
        options: what need not be recognised.
        scratch: a folder for what has to be rewritten before DuckDB reads it.
    Raises:
        PerPEFTError: a file cannot be read, a column is missing, named twice, or ambiguous.
    """
    table = Table(files_of(pattern), {}, "")
    parts = []
    for number, path in enumerate(table.files):
        rows = _open_rows(con, path, required, options, scratch)
        columns = _recognise(path, rows.header, required, optional, options)
        table.columns = table.columns or columns
        needed = [columns[role] for role in required]
        parts.append(_select(rows, number, columns, needed, Path(tempfile.mkstemp(".rows", dir=scratch)[1])))
    table.relation = " UNION ALL ".join(parts)
    return table


@dataclass(frozen=True)
class _Rows:
    """A file whose rows DuckDB can number and take apart; `text` is None for Parquet and JSON."""

    path: Path
    kind: str  # text, json or parquet
    header: list[str]
    text: TextFile | None = None
    nested: frozenset[str] = frozenset()  # columns of lists and structures


def _open_rows(
    con: duckdb.DuckDBPyConnection, path: Path, required: tuple[str, ...], options: TableOptions, scratch: Path
) -> _Rows:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        described = con.execute(f"DESCRIBE SELECT * FROM read_parquet({quote(path)})").fetchall()
        nested = frozenset(row[0] for row in described if row[1].endswith("]") or row[1].startswith(("STRUCT", "MAP", "UNION")))
        return _Rows(path, "parquet", [row[0] for row in described], nested=nested)
    if start.startswith(b"PK"):
        raise PerPEFTError(f"{path} is a zip or Excel file; unpack it, or save the sheet as CSV")
    if start[:1] == b"{" or path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".ndjson", ".json")):
        sample = f"SELECT json FROM {_read_json(path)} LIMIT 1000"
        keys = con.execute(f"SELECT unnest(json_keys(json)) AS key FROM ({sample}) WHERE json_type(json) = 'OBJECT'").fetchall()
        return _Rows(path, "json", list(dict.fromkeys(key for (key,) in keys)))
    if start == ZSTD:
        unpacked = Path(tempfile.mkstemp(".txt", dir=scratch)[1])
        lines = f"SELECT line FROM {_lines(path)}"
        con.execute(f"COPY ({lines}) TO {quote(unpacked)} (FORMAT csv, HEADER false, QUOTE '', ESCAPE '', DELIMITER '\x01')")
        path = unpacked
    numbered = all(options.columns.get(role, "").isdecimal() for role in required)
    text = open_text(path, options.separator, options.encoding, has_header=not numbered)
    return _Rows(path, "text", text.header, text)


def _compression(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    return "'gzip'" if start.startswith(b"\x1f\x8b") else "'zstd'" if start == ZSTD else "'none'"


def _read_json(path: Path, function: str = "read_json_objects", more: str = "") -> str:
    """A JSON or JSON lines file as a table; NULL for lines that are no objects."""
    return (
        f"{function}({quote(path)}, format='auto', ignore_errors=true, maximum_object_size={LONGEST_LINE}, "
        f"compression={_compression(path)}{more})"
    )


def _lines(path: Path) -> str:
    """The non-empty lines of a UTF-8 file as a table of one column `line`."""
    return (
        f"read_csv({quote(path)}, header=false, auto_detect=false, compression={_compression(path)}, "
        f"delim='\x01', quote='', escape='', comment='', nullstr='\x02', "
        f"columns={{'line': 'VARCHAR'}}, max_line_size={LONGEST_LINE}, buffer_size={2 * LONGEST_LINE})"
    )


def _select(rows: _Rows, number: int, columns: dict[str, str | None], needed: list[str], scratch: Path) -> str:
    """A SELECT of place, problem and each role of one file."""
    if rows.kind == "json":
        return select_json(rows.path, number, {role: (name,) if name else () for role, name in columns.items()})
    if rows.kind == "parquet":
        values = {role: "NULL" if name is None else f'"{name}"' for role, name in columns.items()}
        roles = [
            f"{'to_json' if columns[role] in rows.nested else ''}({value})::VARCHAR AS {role}" for role, value in values.items()
        ]
        source = f"read_parquet({quote(rows.path)}, file_row_number=true)"
        return f"SELECT {number << FILE_BITS} + file_row_number + 1 AS place, NULL AS problem, {', '.join(roles)} FROM {source}"
    places = {role: rows.header.index(name) for role, name in columns.items() if name is not None}
    least = max(rows.header.index(name) for name in needed) + 1
    if is_plain(rows.text):
        separator, values = quote(rows.text.separator), {role: f"parts[{place + 1}]" for role, place in places.items()}
        source = (
            f"SELECT line, parts, CASE WHEN trim(replace(text, {separator}, ''), ' \t') = '' THEN 0 WHEN "
            f"trim(array_to_string(parts[{len(rows.header) + 1}:], ''), ' \t') = '' THEN least(len(parts), {len(rows.header)}) "
            f"ELSE len(parts) END AS width FROM (SELECT line, text, string_split(text, {separator}) AS parts FROM "
            f"(SELECT row_number() OVER () AS line, rtrim(line, chr(13)) AS text FROM {_lines(rows.path)})) "
            f"WHERE line > {int(rows.text.has_header)}"
        )
    else:
        write_rows(rows.text, list(places.values()), scratch)
        values = {role: f"replace(parts[{place + 3}], '{NEWLINE}', chr(10))" for place, role in enumerate(places)}
        source = (
            f"SELECT parts[1]::BIGINT AS line, parts, parts[2]::INTEGER AS width "
            f"FROM (SELECT string_split(line, '{CELL}') AS parts FROM {_lines(scratch)})"
        )
    roles = [f"nullif(trim({values[role]}, ' \t'), '') AS {role}" if role in values else f"NULL AS {role}" for role in columns]
    problem = (
        f"CASE WHEN width = 0 THEN '{BLANK}' WHEN width > {len(rows.header)} THEN '{TOO_MANY}' "
        f"WHEN width < {least} THEN '{TOO_FEW}' END"
    )
    return f"SELECT {number << FILE_BITS} + line AS place, {problem} AS problem, {', '.join(roles)} FROM ({source})"


def select_json(path: Path, number: int, keys: dict[str, tuple[str, ...]]) -> str:
    """A SELECT of place, problem and each role of a JSON lines file; only the named keys are read.

    Args:
        keys: by role, the keys of which the first with a value counts; all values of the role "image" become one JSON list.
    """
    names = {name: "JSON" if role == "image" else "VARCHAR" for role, alternatives in keys.items() for name in alternatives}
    quoted = {name: '"' + name.replace('"', '""') + '"' for name in names}
    roles = []
    for role, alternatives in keys.items():
        if role == "image":
            value = f"json_array({', '.join(quoted[name] for name in alternatives)})::VARCHAR" if alternatives else "NULL"
        else:
            value = ", ".join(f"nullif(trim({quoted[name]}), '')" for name in alternatives)
            value = f"coalesce({value})" if value else "NULL"
        roles.append(f"{value} AS {role}")
    problem = f"CASE WHEN coalesce({', '.join(f'{name}::VARCHAR' for name in quoted.values())}) IS NULL THEN '{NO_OBJECT}' END"
    columns = ", ".join(f"{quoted[name]}: '{kind}'" for name, kind in names.items())
    source = f"SELECT row_number() OVER () AS line, * FROM {_read_json(path, 'read_json', f', columns={{{columns}}}')}"
    return f"SELECT {number << FILE_BITS} + line AS place, {problem} AS problem, {', '.join(roles)} FROM ({source})"


def _plain_name(name: str) -> str:
    """A column's name without RecBole's type, case and word separators."""
    return "".join(letter for letter in name.split(":")[0].lower() if letter not in "_- ")


def _recognise(
    path: Path, header: list[str], required: tuple[str, ...], optional: tuple[str, ...], options: TableOptions
) -> dict[str, str | None]:
    """The name of each role's column; see `open_table`."""
    chosen: dict[str, str | None] = {}
    shown = ", ".join(header[:20])[:300] or "none"
    for role in (*required, *optional):
        named = options.columns.get(role)
        found = [name for name in header if name == named] or [name for name in header if name.lower() == (named or "").lower()]
        if named is not None and not found and role != "item":  # which both tables have, maybe under two names
            raise PerPEFTError(f"{path} has no column '{named}' (--{role}_column); its columns are {shown}")
        if not found:
            by_name = ([name for name in header if _plain_name(name) == usual] for usual in NAMES[role])
            found = next((names for names in by_name if names), [])
        if not found and role in required:
            raise PerPEFTError(f"{path} has no column of the {role}; name it by --{role}_column (its columns are {shown})")
        if len(found) > 1:
            raise PerPEFTError(
                f"{path}, line 1: the columns {', '.join(map(repr, found))} could be the {role}; rename or remove all but one"
                + ("" if len(set(found)) == 1 else f", or choose one by --{role}_column")
            )
        chosen[role] = found[0] if found else None
    return chosen
