"""Times of a table as SQL: dates, numbers since 1970 in their usual units, and counters of any other size."""
import math

import duckdb

from utils.common.errors import PerPEFTError, first_line
from utils.prepare.parts import quote

COUNTER, EPOCH, DATE = 0, 1, 2  # kinds of times: any number, one as of 1990 to 2100, a date
# Of numbers as of 1990 to 2100, which their size tells apart: least, most, microseconds in one.
UNITS = (6.3e8, 4.2e9, 1e6), (6.3e11, 4.2e12, 1e3), (6.3e14, 4.2e15, 1), (6.3e17, 4.2e18, 1e-3)
UNIT = " ".join(f"WHEN {{number}} BETWEEN {least} AND {most} THEN {unit}" for least, most, unit in UNITS)
# A number with a decimal comma, which has more than three digits before it.
NUMBER = r"""coalesce(TRY_CAST(time AS DOUBLE),
    CASE WHEN contains(time, ',') THEN TRY_CAST(regexp_replace(time, '^(\d{4,}),', '\1.') AS DOUBLE) END)"""
# An ISO date; also with a space before the zone, or without separators. DuckDB alone takes 13/09/20 for a day of the year 13.
ISO = r"""CASE WHEN regexp_matches(time, '^(\d{4}[-/]|\d{8}T)') THEN coalesce(
    TRY_CAST(time AS TIMESTAMPTZ), TRY_CAST(regexp_replace(time, ' ([+-]\d\d:?\d\d)$', '\1') AS TIMESTAMPTZ),
    TRY_CAST(regexp_replace(time, '^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)', '\1-\2-\3T\4:\5:\6') AS TIMESTAMPTZ)) END"""
# Of rows with `time` and `kind`, where there are no counters: microseconds since 1970.
MICROSECONDS = f"CASE WHEN kind = {EPOCH} THEN time * CASE {UNIT.format(number='time')} END ELSE time END"


def timed_sql(rows: str, form: str | None) -> str:
    """SQL that adds to rows with the text `time` its `value`, NULL where it cannot be read, and its `kind`.

    The value is microseconds since 1970 of a date, and a number as it is. Without a form as of strptime, times are ISO dates
    and numbers.
    """
    date, number = (ISO, NUMBER) if form is None else (f"try_strptime(time, {quote(form)})", "NULL::DOUBLE")
    return f"""
        SELECT *, CASE WHEN number IS NULL THEN epoch_us({date}) WHEN abs(number) < 9e18 THEN number END::DOUBLE AS value,
            CASE WHEN number IS NULL THEN {DATE}
                 WHEN CASE {UNIT.format(number="number")} END IS NULL THEN {COUNTER}
                 ELSE {EPOCH} END::UTINYINT AS kind
        FROM (SELECT *, {number} AS number FROM {rows})"""


def scaled_sql(largest: float) -> str:
    """SQL of the numbers `time`, at most `largest`, times a power of two, which is exact, so that whole parts tell them apart."""
    return f"time * {2.0 ** min(60 - math.frexp(largest)[1], 1000)!r}"


def require_time_format(con: duckdb.DuckDBPyConnection, form: str) -> None:
    """Raise a PerPEFTError for a form of dates that DuckDB does not know."""
    try:
        con.execute("SELECT try_strptime('', ?)", [form])
    except duckdb.Error as error:
        raise PerPEFTError(f"--time_format {form!r}: {first_line(error)[:200]}; for example '%d.%m.%Y %H:%M'") from error
