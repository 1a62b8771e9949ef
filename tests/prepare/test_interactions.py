"""First interactions, the core and the sample of users in SQL, against plain Python on small random tables."""
import duckdb
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.prepare.interactions import EPOCH, keep_core, keep_first, keep_sample

ROWS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=60)


CON = duckdb.connect(config={"threads": 1})


def stage(rows, unusable=()):
    """Make the table `staged` of rows (user, item, time); rows at `unusable` have a reason."""
    values = ", ".join(
        f"({place}, {user}, {item}, {1e9 + time}, {EPOCH}, {repr('x' if place in unusable else '')})"
        for place, (user, item, time) in enumerate(rows)
    )
    CON.execute(f"""
        CREATE OR REPLACE TABLE staged AS SELECT place, user, item, time::DOUBLE AS time, kind, nullif(reason, '') AS reason
        FROM (VALUES {values}) t(place, user, item, time, kind, reason)""")


def kept():
    """Each user's items in the order of their ranks."""
    histories = {}
    for user, item in CON.execute("SELECT user, item FROM kept ORDER BY rank").fetchall():
        histories.setdefault(user, []).append(item)
    return histories


def first_interactions(rows, unusable=()):
    histories = {}
    for place, (user, item, _) in sorted(enumerate(rows), key=lambda row: (row[1][2], row[0])):
        if place not in unusable and item not in histories.setdefault(user, []):
            histories[user].append(item)
    return {user: items for user, items in histories.items() if items}


def core_of(histories, core):
    """One user or item with too few interactions is removed at a time."""
    histories = {user: list(items) for user, items in histories.items()}
    while True:
        few_users = [user for user, items in histories.items() if len(items) < core]
        bought = [item for items in histories.values() for item in items]
        few_items = [item for item in bought if bought.count(item) < core]
        if few_users:
            del histories[few_users[0]]
        elif few_items:
            histories = {user: [item for item in items if item != few_items[0]] for user, items in histories.items()}
        else:
            return histories


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
        found = kept()
        drawn.append(set(found))
        assert {user: set(items) for user, items in found.items()} == {user: set(expected[user]) for user in found}
    assert drawn[0] == drawn[1] <= active and len(drawn[0]) == min(count, len(active))
