"""First interactions, the core and the sample of users in SQL, against plain Python on small random tables."""
import os
import random
import signal
import threading
from collections import Counter

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.prepare.conftest import json_lines, table
from utils.prepare import interactions, lines
from utils.prepare.columns import TableOptions
from utils.prepare.engine import engine
from utils.prepare.interactions import keep_core, keep_first, keep_sample
from utils.prepare.tables import open_table
from utils.prepare.times import EPOCH

ROWS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=60)
CON = duckdb.connect(config={"threads": 1})


def stage(rows, unusable=()):
    """Make the table `staged` of rows (user, item, time); rows at `unusable` have a reason."""
    values = [(place, *row, EPOCH, "x" if place in unusable else "") for place, row in enumerate(rows)]
    CON.execute(f"""
        CREATE OR REPLACE TABLE staged AS SELECT * REPLACE (1e9 + time AS time, nullif(reason, '') AS reason)
        FROM (VALUES {str(values)[1:-1]}) t(place, user, item, time, kind, reason)""")


def kept():
    """Each user's items in the order of their ranks."""
    return dict(CON.execute("SELECT user, list(item ORDER BY rank) FROM kept GROUP BY user").fetchall())


def first_interactions(rows, unusable=()):
    histories = {}
    for place, (user, item, _) in sorted(enumerate(rows), key=lambda row: (row[1][2], row[0])):
        if place not in unusable:
            histories.setdefault(user, {}).setdefault(item)
    return {user: list(items) for user, items in histories.items()}


def core_of(histories, core):
    while True:
        counts = Counter(item for items in histories.values() for item in items)
        users = {user: items for user, items in histories.items() if len(items) >= core}
        left = {user: [item for item in items if counts[item] >= core] for user, items in users.items()}
        if left == histories:
            return left
        histories = left


@settings(max_examples=25, deadline=None)
@given(ROWS, st.sets(st.integers(0, 60)), st.integers(1, 4))
def test_first_interactions_and_the_core(rows, unusable, core):
    stage(rows, unusable)
    expected = first_interactions(rows, unusable)
    usable = len(rows) - len([place for place in unusable if place < len(rows)])
    assert keep_first(CON) == usable - sum(map(len, expected.values()))
    assert kept() == expected
    left = keep_core(CON, core)
    assert kept() == core_of(expected, core)
    assert left == sum(map(len, expected.values())) - sum(map(len, kept().values()))


@settings(max_examples=20, deadline=None)
@given(ROWS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 5), st.randoms())
def test_the_sample_is_of_active_users_and_ignores_the_order_of_rows(rows, count, core, seed, random):
    expected = first_interactions(rows)
    active = {user for user, items in expected.items() if len(items) >= core}
    drawn = []
    for order in (rows, random.sample(rows, len(rows))):
        stage(order)
        keep_first(CON)
        keep_sample(CON, count, core, seed)
        drawn.append(set(found := kept()))
        assert {user: set(items) for user, items in found.items()} == {user: set(expected[user]) for user in found}
    assert drawn[0] == drawn[1] <= active and len(drawn[0]) == min(count, len(active))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_equal_times_keep_the_order_of_files_that_several_cores_read(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST_LINE", 2**13)  # so that the files have many blocks
    con = duckdb.connect(config={"threads": 4})
    draw = random.Random(1)
    rows = [(draw.choice("abc"), str(draw.randrange(5000)), "7") for _ in range(40_000)]
    rows[30_000] = ("a", "", "7")
    header = ("user", "item", "time")
    for number, part in enumerate((rows[:15_000], rows[15_000:])):
        path, text = tmp_path / f"{number}.{kind}", tmp_path / f"{number}.csv"
        text.write_text(table(header, part))
        if kind == "jsonl":
            path.write_text(json_lines(dict(zip(header, row)) for row in part).replace("\n", "\n\n"))
        elif kind == "parquet":
            con.execute(f"COPY (FROM read_csv('{text}', all_varchar=true)) TO '{path}' (ROW_GROUP_SIZE 2048)")
    con.execute("CREATE TABLE items AS SELECT range::INTEGER AS number, range::VARCHAR AS raw_id FROM range(5000)")
    opened = open_table(con, tmp_path / f"*.{kind}", header, (), TableOptions())
    assert interactions.stage(opened, None, None, stable_keys=False) == len(rows)
    line = {"csv": 15_002, "jsonl": 30_001, "parquet": 15_001}[kind]
    assert opened.left_out("staged") == {"item missing": (1, f"1.{kind} line {line}")}
    keep_first(con)
    found = [items for (items,) in con.execute("SELECT list(item ORDER BY rank) FROM kept GROUP BY user").fetchall()]
    expected = first_interactions(rows, {30_000}).values()
    assert sorted(found) == sorted(list(map(int, items)) for items in expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_query(tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as raised, engine(tmp_path) as con:
        threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        while True:  # of short queries, between whose tasks DuckDB asks for signals
            con.execute("SELECT sum(range % 7) FROM range(3000000)")
    assert raised.value.args == (number,) and signal.getsignal(number) == before
    assert not list(tmp_path.iterdir())
