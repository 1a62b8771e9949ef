"""First interactions in time order, the k-core and a sample of users, in DuckDB: out of core, so memory is bounded."""
import duckdb

from utils.common.errors import PerPEFTError
from utils.prepare.engine import one_value, shown_progress
from utils.prepare.parts import BLANK, PROBLEMS, quote
from utils.prepare.tables import ROWS, Table
from utils.prepare.times import COUNTER, DATE, MICROSECONDS, require_time_format, scaled_sql, timed_sql

MOST_ROWS = 1 << 62  # a time times this, plus a row's place, orders rows by time, then place
NO_USER, NO_ITEM, UNKNOWN = "user missing", "item missing", "item unknown or left out"
NO_TIME, UNREADABLE_TIME = "time missing", "time not readable"
NO_RATING, LOW = "rating not a number", "rating below --min_rating"
REASONS = (*PROBLEMS, NO_USER, NO_ITEM, NO_TIME, UNREADABLE_TIME, NO_RATING, LOW, UNKNOWN)
REASON_TYPE = f"ENUM({', '.join(map(quote, REASONS))})"  # one byte a row


def stage(table: Table, time_format: str | None, min_rating: float | None, stable_keys: bool) -> int:
    """Read all interactions once; make the view `staged` of them: place, reason, user (a key), item (its number), time, kind.

    `reason` says why a row cannot be used; NULL where it can. Dates are microseconds since 1970, numbers as they are.

    Args:
        table: in a database with a table `items` (number, raw_id) of the items that can be used.
        stable_keys: whether a user's key is the same in every version of DuckDB, which takes longer.
    Returns:
        how many rows there are, blank ones not counted
    """
    if time_format is not None:
        require_time_format(table.con, time_format)
    rating = "TRY_CAST(replace(rating, ',', '.') AS DOUBLE)"
    low = "" if min_rating is None else f"WHEN {rating} IS NULL THEN '{NO_RATING}' WHEN {rating} < {min_rating!r} THEN '{LOW}'"
    user_key = "md5_number_lower" if stable_keys else "hash"  # 64 bits each
    table.create("interactions", f"""
        WITH timed AS ({timed_sql(ROWS, time_format)})
        SELECT file, {user_key}(timed.user) AS user, hash(item) AS item, value AS time, kind,
               CASE WHEN problem IS NOT NULL THEN problem
                    WHEN timed.user IS NULL THEN '{NO_USER}'
                    WHEN item IS NULL THEN '{NO_ITEM}'
                    WHEN time IS NULL THEN '{NO_TIME}'
                    WHEN value IS NULL THEN '{UNREADABLE_TIME}'
                    {low} END::{REASON_TYPE} AS reason
        FROM timed""")  # fmt: skip
    table.con.execute(f"""
        CREATE OR REPLACE VIEW staged AS
        SELECT i.rowid AS place, i.user, items.number AS item, i.time, i.kind,
               coalesce(i.reason, CASE WHEN items.number IS NULL THEN '{UNKNOWN}' END) AS reason
        FROM interactions i LEFT JOIN items ON hash(items.raw_id) = i.item""")
    return one_value(table.con, f"SELECT count(*) FROM interactions WHERE reason IS DISTINCT FROM '{BLANK}'")


def require_one_kind_of_time(table: Table) -> None:
    """Raise a PerPEFTError where dates stand beside numbers that are no times since 1970; with a line of each."""
    query = "SELECT kind, min(rowid) FROM interactions WHERE time IS NOT NULL GROUP BY kind"
    rows = dict(table.con.execute(query).fetchall())
    if DATE in rows and COUNTER in rows:
        kinds = f"a date in {table.where(rows[DATE])} and a number in {table.where(rows[COUNTER])}"
        raise PerPEFTError(f"{table.files[0].name}: the time is {kinds}; write all as dates, or all as numbers")


def keep_first(con: duckdb.DuckDBPyConnection) -> int:
    """Make the table `kept` (user, item, rank) of each user's first interaction with every item; return how many were repeated.

    Ranks order by time, then place.
    """
    usable, counters, largest = con.execute(f"""
        SELECT count(*), count(*) FILTER (kind = {COUNTER}), max(abs(time)) FILTER (kind <> {DATE}) FROM staged
        WHERE reason IS NULL""").fetchone()
    time = scaled_sql(largest) if counters else MICROSECONDS
    with shown_progress(con, "first interactions"):
        return usable - one_value(con, f"""
            CREATE OR REPLACE TABLE kept AS
            SELECT user, item, min(({time})::HUGEINT * {MOST_ROWS} + place) AS rank FROM staged
            WHERE reason IS NULL GROUP BY user, item""")  # fmt: skip


def keep_core(con: duckdb.DuckDBPyConnection, core: int) -> int:
    """Reduce `kept` to the largest part in which every user and item has at least `core` interactions; return how many go.

    The tables `users` (user, count, first: their first interaction's rank) and `used` (item, count) are made of what remains.
    """
    before = one_value(con, "SELECT count(*) FROM kept")
    few_users, few_items = (f"FROM {table} WHERE count < {core}" for table in ("users", "used"))
    with shown_progress(con, f"{core}-core"):
        while True:
            con.execute("""
                CREATE OR REPLACE TABLE users AS SELECT user, count(*) AS count, min(rank) AS first FROM kept GROUP BY user""")
            con.execute("CREATE OR REPLACE TABLE used AS SELECT item, count(*) AS count FROM kept GROUP BY item")
            if not one_value(con, f"SELECT (SELECT count(*) {few_users}) + (SELECT count(*) {few_items})"):
                return before - one_value(con, "SELECT count(*) FROM kept")
            con.execute(f"""
                CREATE OR REPLACE TABLE kept AS SELECT * FROM kept
                ANTI JOIN (SELECT user {few_users}) USING (user) ANTI JOIN (SELECT item {few_items}) USING (item)""")


def keep_sample(con: duckdb.DuckDBPyConnection, count: int, core: int, seed: int) -> int:
    """Reduce `kept` to `count` users drawn by `seed` from those with at least `core` interactions; return how many rows go.

    The draw depends on the users' ids alone, not on the order of rows.
    """
    return one_value(con, f"""
        DELETE FROM kept WHERE user NOT IN (
            SELECT user FROM kept GROUP BY user HAVING count(*) >= {core}
            ORDER BY md5(concat({seed}, ' ', user)), user LIMIT {count})""")  # fmt: skip
