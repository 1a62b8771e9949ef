"""For any lines and raw ids: histories are those of a slow reading of the lines, and mistakes are named by their places."""
import pickle
from collections import defaultdict

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.conftest import write_dataset
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset

with_files = settings(max_examples=60, suppress_health_check=list(HealthCheck))
NUM_ITEMS = 12
items = st.integers(1, NUM_ITEMS)


def unpacked(histories):
    return [histories[user].tolist() for user in range(histories.num_users)]


def naive_histories(pairs):
    """Each user's items in the order of the lines, users by number."""
    found = defaultdict(list)
    for user, item in pairs:
        found[user].append(item)
    return sorted(found), [found[user] for user in sorted(found)]


user_numbers = st.one_of(st.integers(1, 6), st.integers(1, 2**63 - 1))
pairs_of_lines = st.lists(st.tuples(user_numbers, items), min_size=3, max_size=40)
indent = st.sampled_from(["", " ", "\t"])
blank = st.sampled_from([" ", "\t", "  ", " \t "])
line_end = st.sampled_from(["\n", "\r\n", "\n\n", " \n", "\n \t\n"])


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("properties"), "shop", {1: [1, 2, 3]}, ["a"] * NUM_ITEMS, draw=False)


@with_files
@given(pairs_of_lines, st.data())
def test_lines_become_the_histories_that_they_list(shop, pairs, data):
    users, expected = naive_histories(pairs)
    assume(max(map(len, expected)) >= 3)
    lines = [f"{data.draw(indent)}{user}{data.draw(blank)}{item}{data.draw(line_end)}" for user, item in pairs]
    (shop / "shop_final.txt").write_bytes("".join(lines).encode())
    dataset = read_dataset(shop, "shop", contents=False)
    assert dataset.user_ids.tolist() == users
    assert unpacked(dataset.histories) == expected
    assert dataset.counts() == {"users": len(users), "items": NUM_ITEMS, "interactions": len(pairs)}


wrong_lines = st.sampled_from(["x 1", "1", "1 2 3", "1.0 2", "0 1", "1 0", "-3 2", "1 -4", "1 1e3", "1 9223372036854775808"])


@with_files
@given(pairs_of_lines, st.lists(st.tuples(st.integers(0, 40), wrong_lines), min_size=1, max_size=5))
def test_wrong_lines_are_named_by_their_numbers(shop, pairs, wrong):
    lines = [f"{user} {item}" for user, item in pairs]
    for place, line in wrong:
        lines.insert(place, line)
    (shop / "shop_final.txt").write_text("\n".join(lines))
    below_one = {"0 1", "1 0", "-3 2", "1 -4"}
    inserted = {line for _, line in wrong}
    expected = [(number, line in below_one) for number, line in enumerate(lines, 1) if line in inserted]
    with pytest.raises(PerPEFTError) as raised:
        read_dataset(shop, "shop", contents=False)
    for heading, small in (("not two integers", False), ("below 1", True)):
        numbers = [number for number, is_small in expected if is_small == small]
        lines_of_kind = [line for line in str(raised.value).splitlines() if heading in line]
        assert bool(lines_of_kind) == bool(numbers)
        if numbers:
            assert f"({len(numbers)}): " in lines_of_kind[0]
            assert [f"line {number} '{lines[number - 1]}'" in lines_of_kind[0] for number in numbers] == [True] * len(numbers)


@with_files
@given(st.permutations(range(1, NUM_ITEMS + 1)), st.sets(st.integers(1, 3 * NUM_ITEMS)), st.booleans())
def test_raw_ids_stand_in_the_order_of_the_numbers_or_gaps_are_named(shop, order, numbers, padding):
    table = {number: f"B{number:03d}" for number in order}
    (shop / "shop_final.txt").write_text("1 1\n1 2\n1 3\n")
    path = shop / "shop_item2id_final.pickle"
    whole = path.read_bytes()
    try:
        path.write_bytes(pickle.dumps(({0: "padding"} if padding else {}) | table))
        assert read_dataset(shop, "shop", contents=False).raw_ids == [f"B{number:03d}" for number in range(1, NUM_ITEMS + 1)]
        numbers |= {1, 2, 3}
        gaps = sorted(set(range(1, max(numbers))) - numbers)
        path.write_bytes(pickle.dumps({number: f"B{number:03d}" for number in numbers}))
        if gaps:
            with pytest.raises(PerPEFTError) as raised:
                read_dataset(shop, "shop", contents=False)
            assert f"({len(gaps)}): {', '.join(map(str, gaps[:10]))}" in str(raised.value)
        else:
            assert read_dataset(shop, "shop", contents=False).num_items == max(numbers)
    finally:
        path.write_bytes(whole)
