"""First interactions in time order, the k-core and a sample of users, in DuckDB: out of core, so memory is bounded."""

import contextlib
import math
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import duckdb

from utils.common.errors import PerPEFTError, first_line
from utils.prepare.columns import TableOptions
from utils.prepare.parts import BLANK, PROBLEMS, quote
from utils.prepare.progress import shown_progress
from utils.prepare.tables import ROWS, Table

MEMORY = "1GB"  # of DuckDB; the process stays below 2 GiB with what lies outside it
THREADS = 8  # DuckDB asks for 125 MB of memory for each
UNKNOWN, LOW = "item unknown or left out", "rating below --min_rating"
NO_TIME = "time not readable"
REASONS = (
    *PROBLEMS,
    "user missing",
    "item missing",
    "time missing",
    NO_TIME,
    "rating not a number",
    LOW,
    UNKNOWN,
)
REASON_TYPE = f"ENUM({', '.join(map(quote, REASONS))})"  # one byte a row
SHOWN_ROWS = 3  # of each reason for leaving rows out
DATE, EPOCH = 2, 1  # kinds of times: a date, a number as of 1990 to 2100; 0 is any other number
# Such numbers may be seconds, milliseconds, microseconds or nanoseconds since 1970; which one, their size says.
UNITS = " ".join(f"WHEN %s BETWEEN 6.3e{8 + power} AND 4.2e{9 + power} THEN 1e{6 - power}" for power in (0, 3, 6, 9))


# An ISO date; also with a space before the zone, or without separators. DuckDB takes 13/09/20 for a day of the year 13.
DATE_SQL = r"""CASE WHEN regexp_matches(time, '^(\d{4}[-/]|\d{8}T)') THEN coalesce(
    TRY_CAST(time AS TIMESTAMPTZ), TRY_CAST(regexp_replace(time, ' ([+-]\d\d:?\d\d)$', '\1') AS TIMESTAMPTZ),
    TRY_CAST(regexp_replace(time, '^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)', '\1-\2-\3T\4:\5:\6') AS TIMESTAMPTZ)) END"""


def _number(column: str) -> str:
    """SQL of a number; a comma after more than three digits is a decimal one."""
    comma = f"CASE WHEN contains({column}, ',') THEN TRY_CAST(regexp_replace({column}, '^([0-9]{{4,}}),', '\\1.') AS DOUBLE) END"
    return f"coalesce(TRY_CAST({column} AS DOUBLE), {comma})"


def _unit(column: str) -> str:
    """SQL of the microseconds in one of a number's unit; NULL for a number that is no time of those years."""
    return f"CASE {UNITS.replace('%s', column)} END"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM end a query as KeyboardInterrupt; DuckDB turns what a handler raises into a RuntimeError."""
    received: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except RuntimeError as error:
        if received:
            raise KeyboardInterrupt(received[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection of bounded memory, which spills to a temporary folder in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".prepare_", suffix=".tmp", dir=folder))
    try:
        with _interruptible(), duckdb.connect() as con:
            threads = con.execute("SELECT current_setting('threads')").fetchone()[0]
            con.execute(f"SET threads = {min(threads, THREADS)}; SET memory_limit = '{MEMORY}'; SET TimeZone = 'UTC'")
            con.execute(f"SET temp_directory = {quote(scratch)}")
            yield con
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def stage(
    con: duckdb.DuckDBPyConnection, table: Table, options: TableOptions, min_rating: float | None, stable_keys: bool
) -> int:
    """Read all interactions once; make the view `staged` of them: place, reason, user (a key), item (its number), time, kind.

    `reason` says why a row cannot be used; NULL where it can. Dates are microseconds since 1970, numbers as they are.

    Args:
        con: with a table `items` (number, raw_id) of the items that can be used.
        table: of the roles user, item, time and, with `min_rating`, rating.
        options: for the format of dates.
        min_rating: rows with a lower rating are left out; None keeps all.
        stable_keys: whether a user's key is the same in every version of DuckDB, which takes longer.
    Returns:
        how many rows there are, blank ones not counted
    """
    form = options.time_format
    if form is not None:
        _require_time_format(con, form)
    date = DATE_SQL if form is None else f"try_strptime(time, {quote(form)})"
    number = _number("time") if form is None else "NULL::DOUBLE"
    rating = "TRY_CAST(replace(rating, ',', '.') AS DOUBLE)"
    low = "" if min_rating is None else (
        f"WHEN {rating} IS NULL THEN 'rating not a number' WHEN {rating} < {min_rating!r} THEN '{LOW}' "
    )  # fmt: skip
    user_key = "md5_number_lower" if stable_keys else "hash"  # 64 bits each
    table.create(con, "interactions", f"""
        WITH cells AS (SELECT *, {number} AS number FROM {ROWS}),
        timed AS (
            SELECT *, CASE WHEN number IS NULL THEN epoch_us({date}) WHEN abs(number) < 9e18 THEN number END::DOUBLE AS value,
                   CASE WHEN number IS NULL THEN {DATE} WHEN {_unit('number')} IS NULL THEN 0 ELSE {EPOCH} END::UTINYINT AS kind
            FROM cells)
        SELECT file, {user_key}(timed.user) AS user, hash(item) AS item, value AS time, kind,
               CASE WHEN problem IS NOT NULL THEN problem WHEN timed.user IS NULL THEN 'user missing'
                    WHEN item IS NULL THEN 'item missing' WHEN time IS NULL THEN 'time missing'
                    WHEN value IS NULL THEN '{NO_TIME}' {low} END::{REASON_TYPE} AS reason
        FROM timed""")  # fmt: skip
    con.execute(f"""
        CREATE OR REPLACE VIEW staged AS
        SELECT i.rowid AS place, i.user, items.number AS item, i.time, i.kind,
               coalesce(i.reason, CASE WHEN items.number IS NULL THEN '{UNKNOWN}' END) AS reason
        FROM interactions i LEFT JOIN items ON hash(items.raw_id) = i.item""")
    return _one(con, f"SELECT count(*) FROM interactions WHERE reason IS DISTINCT FROM '{BLANK}'")


def _require_time_format(con: duckdb.DuckDBPyConnection, form: str) -> None:
    try:
        con.execute("SELECT try_strptime('', ?)", [form])
    except duckdb.Error as error:
        raise PerPEFTError(f"--time_format {form!r}: {first_line(error)[:200]}; for example '%d.%m.%Y %H:%M'") from error


def _one(con: duckdb.DuckDBPyConnection, query: str) -> int:
    return con.execute(query).fetchone()[0]


def require_one_kind_of_time(con: duckdb.DuckDBPyConnection, table: Table) -> None:
    """Do nothing unless dates stand beside numbers that are no times since 1970.

    Raises:
        PerPEFTError: they do; with a line of each.
    """
    rows = dict(con.execute("SELECT kind, min(rowid) FROM interactions WHERE time IS NOT NULL GROUP BY kind").fetchall())
    if DATE in rows and 0 in rows:
        raise PerPEFTError(
            f"{table.files[0].name}: the time is a date in {table.where(rows[DATE])} and a number in {table.where(rows[0])}; "
            "write all as dates, or all as numbers"
        )


def left_out(con: duckdb.DuckDBPyConnection, table: Table, relation: str) -> dict[str, tuple[int, list[str]]]:
    """How many rows of a table (with columns place and reason) have each reason, and the first of them."""
    found = con.execute(f"""
        SELECT reason, count(*), min(place, {SHOWN_ROWS}) FROM {relation}
        WHERE reason IS NOT NULL GROUP BY reason ORDER BY min(place)""").fetchall()
    return {reason: (count, [table.where(place) for place in places]) for reason, count, places in found}


def keep_first(con: duckdb.DuckDBPyConnection) -> int:
    """Make the table `kept` (user, item, rank): each user's first interaction with every item; ranks order by time, then place.

    Returns:
        how many interactions are repeated ones
    """
    usable, others, largest = con.execute(f"""
        SELECT count(*), count(*) FILTER (kind = 0), max(abs(time)) FILTER (kind <> {DATE}) FROM staged
        WHERE reason IS NULL""").fetchone()
    if others:  # counters, say: their size says nothing; multiplied exactly, so that small differences count
        time = f"time * {2.0 ** min(60 - math.frexp(largest)[1], 1000)!r}"
    else:
        time = f"CASE WHEN kind = {EPOCH} THEN time * {_unit('time')} ELSE time END"
    with shown_progress(con, "first interactions"):
        con.execute(f"""
            CREATE OR REPLACE TABLE kept AS
            SELECT user, item, min(({time})::HUGEINT * {1 << 62} + place) AS rank FROM staged
            WHERE reason IS NULL GROUP BY user, item""")
    return usable - _one(con, "SELECT count(*) FROM kept")


def keep_core(con: duckdb.DuckDBPyConnection, core: int) -> int:
    """Reduce `kept` to the largest part in which every user and item has at least `core` interactions; return how many left.

    The tables `users` (user, count, first: their first interaction's rank) and `used` (item, count) are made of what remains.
    """
    before = _one(con, "SELECT count(*) FROM kept")
    few_users, few_items = (f"FROM {table} WHERE count < {core}" for table in ("users", "used"))
    with shown_progress(con, f"{core}-core"):
        while True:
            con.execute("""
                CREATE OR REPLACE TABLE users AS SELECT user, count(*) AS count, min(rank) AS first FROM kept GROUP BY user""")
            con.execute("CREATE OR REPLACE TABLE used AS SELECT item, count(*) AS count FROM kept GROUP BY item")
            if not _one(con, f"SELECT (SELECT count(*) {few_users}) + (SELECT count(*) {few_items})"):
                return before - _one(con, "SELECT count(*) FROM kept")
            con.execute(f"""
                CREATE OR REPLACE TABLE kept AS SELECT * FROM kept
                ANTI JOIN (SELECT user {few_users}) USING (user) ANTI JOIN (SELECT item {few_items}) USING (item)""")


def keep_sample(con: duckdb.DuckDBPyConnection, count: int, core: int, seed: int) -> int:
    """Reduce `kept` to `count` users drawn by `seed` from those with at least `core` interactions; return how many rows left.

    The draw depends on the users' ids alone, not on the order of rows.
    """
    before = _one(con, "SELECT count(*) FROM kept")
    con.execute(f"""
        CREATE OR REPLACE TABLE kept AS SELECT * FROM kept SEMI JOIN (
            SELECT user FROM kept GROUP BY user HAVING count(*) >= {core}
            ORDER BY md5(concat({seed}, ' ', user)), user LIMIT {count}
        ) USING (user)""")
    return before - _one(con, "SELECT count(*) FROM kept")
