"""A table of any usual format: its files, its columns recognised by their names, and queries on its rows."""
import contextlib
import functools
import glob
import itertools
from pathlib import Path

import duckdb

from utils.common.errors import PerPEFTError, first_line
from utils.prepare.columns import TableOptions, recognise_columns
from utils.prepare.engine import one_value, shown_progress
from utils.prepare.json_files import is_document, json_keys, json_part
from utils.prepare.lines import named_lines, named_text, require_encoding, text_lines
from utils.prepare.parts import SOURCE, Part, name_sql, parquet_part, parquet_source, quote, text_part
from utils.prepare.text_tables import recognise_form

ROWS = "{rows}"
HEAD = 1000  # lines by which a file's form is recognised, and within which all keys of JSON are usually named
SHOWN_ROWS = 3  # of each reason for leaving rows out
LeftOut = dict[str, tuple[int, str]]  # reason -> how many rows, and the lines of the first


class Table:
    """A table opened. Its rows have a file (its number), a problem (VARCHAR, NULL for a usable row), and each role (VARCHAR).

    `columns` names each role's column in the first file, None where there is none.
    """

    def __init__(self, con: duckdb.DuckDBPyConnection, parts: list[Part], encoding: str | None = None):
        self.con, self.parts, self.encoding = con, parts, encoding
        self.files, self.columns = [part.path for part in parts], parts[0].columns
        self._careful, self._made = False, ""  # whether each line is verified; the name of the table of all rows

    def create(self, name: str, query: str) -> None:
        """Make a table of a query that selects `file` and more of ROWS; `rowid`, the order of the rows, is their place."""
        self.execute(f"CREATE OR REPLACE TABLE {name} AS {query}")
        self._made = name

    def execute(self, query: str) -> list[tuple]:
        """Run a query in which ROWS stands for the rows of all files; twice if a file cannot be read the fast way.

        Raises:
            PerPEFTError: a file is damaged, not in its encoding, or has a line that cannot be read.
        """
        try:
            with contextlib.ExitStack() as opened:
                parts = [self._select(part, opened) for part in self.parts]
                rows = " UNION ALL ".join(f"SELECT {n}::USMALLINT AS file, * FROM ({part})" for n, part in enumerate(parts))
                opened.enter_context(shown_progress(self.con, self.files[0].name))
                return self.con.execute(query.replace(ROWS, f"({rows})")).fetchall()
        except (duckdb.OutOfMemoryException, RuntimeError):  # the latter after a signal
            raise
        except Exception as error:
            damage = isinstance(error, (duckdb.IOException, duckdb.InvalidInputException)) or type(error) is duckdb.Error
            if self._careful and damage:
                names, reason = ", ".join(map(str, self.files[:3])), first_line(error)[:200]
                raise PerPEFTError(f"{names} cannot be read; is it cut off or damaged? ({reason})") from error
            if self._careful:
                raise
        self._careful = True  # the errors of this way name the line
        return self.execute(query)

    def _select(self, part: Part, opened: contextlib.ExitStack) -> str:
        if part.rows is None:
            return part.fast
        if self._careful:
            texts = (text for _, text in part.rows(text_lines(part.path, self.encoding)))
            return part.careful.replace(SOURCE, quote(opened.enter_context(named_lines(texts))))
        return part.fast.replace(SOURCE, quote(opened.enter_context(named_text(part.path, self.encoding))))

    def first_rows(self, roles: list[str], count: int) -> list[tuple]:
        """Some columns of the first usable rows that have a value in the first of them."""
        usable = f"problem IS NULL AND {roles[0]} IS NOT NULL"
        return self.execute(f"SELECT {', '.join(roles)} FROM {ROWS} WHERE {usable} LIMIT {count}")

    def where(self, place: int) -> str:
        """The line of a row that `create` found, with its file where there are several."""
        file = one_value(self.con, f"SELECT file FROM {self._made} WHERE rowid = {place}")
        row = one_value(self.con, f"SELECT count(*) FROM {self._made} WHERE file = {file} AND rowid < {place}")
        part = self.parts[file]
        if part.skipped is not None and (part.rows is None or not self._careful):
            line = part.skipped + row + 1
        else:
            line = next(itertools.islice(part.rows(text_lines(part.path, self.encoding)), row, None))[0]
        return f"line {line}" if len(self.parts) == 1 else f"{part.path.name} line {line}"

    def left_out(self, relation: str) -> LeftOut:
        """How many rows of a relation (with columns place and reason) have each reason, and where the first of them are."""
        found = self.con.execute(f"""
            SELECT reason, count(*), min(place, {SHOWN_ROWS}) FROM {relation}
            WHERE reason IS NOT NULL GROUP BY reason ORDER BY min(place)""").fetchall()
        more = {reason: ", ..." if count > SHOWN_ROWS else "" for reason, count, _ in found}
        return {reason: (count, ", ".join(map(self.where, places)) + more[reason]) for reason, count, places in found}

    def describe(self, heading: str) -> str:
        """Which column was chosen for each role."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        columns = ", ".join(f"{role} = {name}" for role, name in self.columns.items() if name)
        return f"{heading}: {self.files[0]}{more} ({columns})"


def files_of(pattern: str | Path) -> list[Path]:
    """The files that a name, a folder or a pattern such as 'reviews_*.csv' stands for, in order; of several, those not empty.

    Raises:
        PerPEFTError: there is none.
    """
    if Path(pattern).is_dir():  # a table as Spark writes it, with files for itself beside the parts
        files = [path for path in sorted(Path(pattern).rglob("*")) if not path.name.startswith((".", "_"))]
    else:
        files = [Path(pattern)] if Path(pattern).exists() else [Path(n) for n in sorted(glob.glob(str(pattern), recursive=True))]
    files = [file for file in files if file.is_file()]
    if not files:
        raise PerPEFTError(f"{pattern}: no such file")
    return [file for file in files if file.stat().st_size] or files[:1]


def open_table(
    con: duckdb.DuckDBPyConnection,
    pattern: str | Path,
    required: tuple[str, ...],
    optional: tuple[str, ...],
    options: TableOptions,
) -> Table:
    """Recognise the format and the columns of a file, or of several by a pattern; roles are the keys of `columns.NAMES`.

    Raises:
        PerPEFTError: a file cannot be read, a column is missing, named twice, or ambiguous.
    """
    require_encoding(options.encoding)
    files = files_of(pattern)
    all_keys = functools.cache(lambda: json_keys(files, options.encoding))  # at most once for all parts

    recognise = functools.partial(recognise_columns, required=required, optional=optional, options=options)

    def open_part(path: Path) -> Part:
        with path.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        if is_parquet:
            types = _parquet_types(con, path)
            columns = recognise(path, list(types))
            if "image" in required:
                _require_text(con, path, columns["image"], types[columns["image"]])
            return parquet_part(path, columns, types)
        head = list(itertools.islice(text_lines(path, options.encoding), HEAD))
        start = "\n".join(head)
        whole = is_document(start)
        if whole or start.lstrip().startswith("{"):
            try:
                columns = recognise(path, json_keys([path], options.encoding, first=HEAD))
            except PerPEFTError:  # writers that leave empty values out may name a key late, or only in another file
                columns = recognise(path, all_keys())
            return json_part(path, {role: (name,) if name else () for role, name in columns.items()}, whole)
        numbered = all(options.columns.get(role, "").isdecimal() for role in required)
        form = recognise_form(path, head, options.separator, has_header=not numbered)
        columns = recognise(path, form.header)
        return text_part(form, columns, [columns[role] for role in required])

    return Table(con, list(map(open_part, files)), options.encoding)


def _parquet_types(con: duckdb.DuckDBPyConnection, path: Path) -> dict[str, str]:
    """The types of a Parquet file's columns by their names."""
    try:
        return {row[0]: row[1] for row in con.execute(f"DESCRIBE FROM {parquet_source(path)}").fetchall()}
    except duckdb.Error as error:
        raise PerPEFTError(f"{path} is cut off or damaged, or no Parquet file ({first_line(error)[:200]})") from error


def _require_text(con: duckdb.DuckDBPyConnection, path: Path, column: str, kind: str) -> None:
    """Refuse images' bytes, alone or as `datasets` stores them; a column of names may be of bytes, too."""
    name = name_sql(column)
    texts = {"BLOB": f"try(decode({name}))", "STRUCT(bytes BLOB, path VARCHAR)": f"{name}.path"}
    if kind not in texts:
        return
    value = con.execute(f"SELECT {texts[kind]} FROM {parquet_source(path)} WHERE {name} IS NOT NULL LIMIT 1").fetchall()
    if value == [(None,)]:
        advice = "write them as files named by the item's id into a folder, and name that by --images"
        raise PerPEFTError(f"{path}: the column '{column}' holds the images themselves; {advice}")
