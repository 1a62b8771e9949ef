"""For any data: splitting, renumbering, sampling and metrics agree with slow versions written from DESIGN.md alone."""
import math
import pickle
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.conftest import write_dataset
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.data.histories import Histories, leave_last_out
from utils.training.evaluation import CUTOFFS, metrics_of, rank_targets
from utils.training.sampling import InteractionIndex, Sampler, group_items

checked = settings(derandomize=True, deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
with_files = settings(checked, max_examples=60, suppress_health_check=list(HealthCheck))
NUM_ITEMS = 12

items = st.integers(1, NUM_ITEMS)
histories = st.lists(st.lists(items, max_size=9), min_size=1, max_size=10)  # a list of items a user
some_histories = st.lists(st.lists(items, min_size=1, max_size=9), min_size=1, max_size=10)


def unpacked(histories):
    return [histories[user].tolist() for user in range(histories.num_users)]


# ---------------------------------------------------------------- from lines to histories


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


# ---------------------------------------------------------------- splitting


def naive_split(history):
    """(train, valid item, test item) of one user; 0 for none."""
    return (history[:-2], history[-2], history[-1]) if len(history) >= 3 else (history, 0, 0)


@checked
@given(histories)
def test_split_is_the_naive_one(lists):
    split = leave_last_out(Histories.of_lists(lists))
    expected = [naive_split(history) for history in lists]
    assert unpacked(split.train) == [train for train, _, _ in expected]
    assert split.valid.tolist() == [valid for _, valid, _ in expected]
    assert split.test.tolist() == [test for _, _, test in expected]
    assert unpacked(split.train_and_valid) == [train + [valid] * (valid > 0) for train, valid, _ in expected]
    assert split.evaluated_users.tolist() == [user for user, history in enumerate(lists) if len(history) >= 3]


@checked
@given(histories)
def test_histories_are_the_lists_that_they_are_made_of(lists):
    histories = Histories.of_lists(lists)
    assert unpacked(histories) == lists
    assert histories.lengths.tolist() == list(map(len, lists))
    assert histories.users.tolist() == [user for user, history in enumerate(lists) for _ in history]


@checked
@given(histories, st.data())
def test_shortened_histories_are_the_first_items(lists, data):
    lengths = [data.draw(st.integers(0, len(history))) for history in lists]
    shortened = Histories.of_lists(lists).shortened(np.array(lengths))
    assert unpacked(shortened) == [history[:length] for history, length in zip(lists, lengths)]


@checked
@given(histories, st.integers(1, 12), st.data())
def test_last_items_are_padded_on_the_left(lists, count, data):
    users = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=15))
    found = Histories.of_lists(lists).last(np.array(users, dtype=np.int64), count)
    assert found.shape == (len(users), count)
    assert found.tolist() == [([0] * count + lists[user])[-count:] for user in users]


# ---------------------------------------------------------------- sampling


@checked
@given(histories)
def test_interaction_index_knows_the_interactions(lists):
    index = InteractionIndex(Histories.of_lists(lists), NUM_ITEMS)
    users, queried = np.meshgrid(np.arange(len(lists)), np.arange(1, NUM_ITEMS + 1), indexing="ij")
    expected = [[item in history for item in range(1, NUM_ITEMS + 1)] for history in lists]
    assert index.contains(users, queried).tolist() == expected
    assert [index.items_of(user).tolist() for user in range(len(lists))] == [sorted(set(history)) for history in lists]


@checked
@given(some_histories, st.integers(1, 4), st.data())
def test_group_items_are_those_of_its_users(lists, num_groups, data):
    groups = np.array([data.draw(st.integers(0, num_groups - 1)) for _ in lists])
    found = group_items(Histories.of_lists(lists), groups, num_groups)
    expected = [set() for _ in range(num_groups)]
    for user, history in enumerate(lists):
        expected[groups[user]] |= set(history)
    assert [candidates.tolist() for candidates in found] == [sorted(own) for own in expected]


@st.composite
def samplers(draw):
    """(what makes a sampler, its arguments in plain lists) over random users, groups and sizes."""
    lists = draw(some_histories)
    assume(any(len(history) >= 2 for history in lists))
    assume(all(len(set(history)) < NUM_ITEMS for history in lists))
    num_groups = draw(st.integers(1, 3))
    groups = [draw(st.integers(0, num_groups - 1)) for _ in lists]
    train = Histories.of_lists(lists)
    candidates = [np.arange(1, NUM_ITEMS + 1)] * num_groups
    if draw(st.booleans()):
        candidates = group_items(train, np.array(groups), num_groups)
    batch_size, maxlen, seed = draw(st.integers(1, 5)), draw(st.integers(1, 7)), (draw(st.integers(0, 2**31)), 3)

    def make():
        return Sampler(train, NUM_ITEMS, np.array(groups), candidates, batch_size, maxlen, seed)

    return make, lists, groups, [set(own.tolist()) for own in candidates], batch_size, maxlen


@checked
@given(samplers(), st.integers(1, 3))
def test_plan_meets_every_user_with_a_transition_once(drawn, epoch):
    make, lists, groups, candidates, batch_size, _ = drawn
    sampler = make()
    plan = sampler.plan(epoch)
    members = [[] for _ in candidates]
    for user, history in enumerate(lists):
        if len(history) >= 2:
            members[groups[user]].append(user)
    sizes = [[] for _ in candidates]
    for group, users in plan:
        assert all(groups[user] == group for user in users)
        sizes[group].append(len(users))
    for group, own in enumerate(members):
        assert sorted(user for batch_group, users in plan if batch_group == group for user in users) == own
        assert len(sizes[group]) == math.ceil(len(own) / batch_size)
        assert sorted(sizes[group])[1:] == [batch_size] * (len(sizes[group]) - 1)  # all but one are full
    assert sampler.num_batches == len(plan)


@checked
@given(samplers(), st.integers(1, 3), st.data())
def test_batch_holds_the_last_transitions_and_items_outside_the_history(drawn, epoch, data):
    make, lists, _, candidates, _, maxlen = drawn
    sampler = make()
    step = data.draw(st.integers(0, sampler.num_batches - 1))
    group, users = sampler.plan(epoch)[step]
    batch = sampler.batch(epoch, step)
    assert batch.group == group and batch.items[0] == 0
    assert (np.diff(batch.items) > 0).all()  # each distinct item once
    seq, positives, negatives = (batch.items[rows].tolist() for rows in (batch.seq, batch.positives, batch.negatives))
    used = {0}
    for row, user in enumerate(users):
        history = lists[user]
        transitions = list(zip(history, history[1:]))[-maxlen:]
        padding = maxlen - len(transitions)
        assert seq[row] == [0] * padding + [item for item, _ in transitions]
        assert positives[row] == [0] * padding + [item for _, item in transitions]
        assert negatives[row][:padding] == [0] * padding
        allowed = (candidates[group] - set(history)) or (set(range(1, NUM_ITEMS + 1)) - set(history))
        assert set(negatives[row][padding:]) <= allowed
        used |= {*seq[row], *positives[row], *negatives[row]}
    assert set(batch.items.tolist()) == used


@checked
@given(samplers(), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_any_step_can_be_repeated_in_any_order(drawn, epochs):
    make = drawn[0]
    straight = make()
    steps = range(straight.num_batches)
    expected = {(epoch, step): straight.batch(epoch, step) for epoch in sorted(set(epochs)) for step in steps}
    other = make()
    for epoch in epochs:  # with returns to earlier epochs, as after a resume
        for step in reversed(steps):
            found, again = other.batch(epoch, step), expected[epoch, step]
            for name in ("items", "seq", "positives", "negatives"):
                np.testing.assert_array_equal(getattr(found, name), getattr(again, name))


@pytest.mark.parametrize("history", [[1, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9], list(range(1, 12))])
def test_negatives_are_uniform_over_what_is_left(history):
    """Also where nearly everything is in the history, and draws are repeated or made from what is left."""
    sampler = Sampler(Histories.of_lists([history]), NUM_ITEMS, np.zeros(1, int), [np.arange(1, NUM_ITEMS + 1)], 1, 5, (1,))
    draws = sampler.negatives(np.zeros(20_000, dtype=np.int64), 0, np.random.default_rng(0))
    counts = Counter(draws.tolist())
    left = sorted(set(range(1, NUM_ITEMS + 1)) - set(history))
    assert sorted(counts) == left
    expected = 20_000 / len(left)
    chi_square = sum((counts[item] - expected) ** 2 / expected for item in left)
    assert chi_square < len(left) - 1 + 5 * math.sqrt(2 * len(left))  # five standard deviations


# ---------------------------------------------------------------- ranking and metrics


def naive_rank(scores, target, excluded):
    """How many other candidates score at least as high; a NaN score counts against the model."""
    rank = 0
    for item in range(1, len(scores)):
        if item != target and item not in excluded and not scores[item] < scores[target]:
            rank += 1
    return rank


coarse = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])  # few values, so that ties are common


@checked
@given(some_histories, st.lists(coarse, min_size=2 * NUM_ITEMS, max_size=2 * NUM_ITEMS), st.data())
def test_ranks_are_the_naive_ones_with_ties_against_the_model(lists, entries, data):
    inputs = torch.tensor([100.0, 100.0, *entries]).view(-1, 2)  # the padding item would beat all
    users = np.array(data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=12)))
    states = torch.tensor([[data.draw(coarse), data.draw(coarse)] for _ in users])
    targets = np.array([data.draw(items) for _ in users])  # which may be among the user's own items
    found = rank_targets(states, inputs, targets, Histories.of_lists(lists), users)
    expected = [
        naive_rank((inputs @ state).tolist(), target, set(lists[user])) for state, target, user in zip(states, targets, users)
    ]
    assert found.tolist() == expected


@checked
@given(some_histories, st.data())
def test_scores_that_are_no_numbers_never_help(lists, data):
    inputs = torch.arange(2.0 * NUM_ITEMS + 2).view(-1, 2)
    broken = data.draw(st.sets(items, min_size=1, max_size=4))
    inputs[list(broken)] = float("nan")
    users = np.arange(len(lists))
    targets = np.array([data.draw(items) for _ in users])
    found = rank_targets(torch.ones(len(users), 2), inputs, targets, Histories.of_lists(lists), users)
    scores = inputs.sum(1).tolist()
    for user, target in enumerate(targets):
        others = set(range(1, NUM_ITEMS + 1)) - set(lists[user]) - {target}
        if target in broken:
            assert found[user] >= len(others)  # it is last
        else:
            assert found[user] == naive_rank(scores, target, set(lists[user]))


@checked
@given(st.lists(st.integers(0, 60), min_size=1, max_size=50))
def test_metrics_are_the_naive_means(ranks):
    found = metrics_of(np.array(ranks))
    assert set(found) == {f"{name}@{k}" for name in ("HR", "NDCG") for k in CUTOFFS}
    for k in CUTOFFS:
        hits = [1.0 if rank < k else 0.0 for rank in ranks]
        gains = [1 / math.log2(rank + 2) if rank < k else 0.0 for rank in ranks]
        assert math.isclose(found[f"HR@{k}"], sum(hits) / len(ranks), abs_tol=1e-12)
        assert math.isclose(found[f"NDCG@{k}"], sum(gains) / len(ranks), abs_tol=1e-12)
        assert 0 <= found[f"NDCG@{k}"] <= found[f"HR@{k}"] <= 1


@checked
@given(st.lists(st.integers(0, 60), min_size=1, max_size=30), st.data())
def test_metrics_never_fall_when_a_rank_rises_and_do_not_depend_on_the_order(ranks, data):
    place = data.draw(st.integers(0, len(ranks) - 1))
    better = [*ranks]
    better[place] = data.draw(st.integers(0, ranks[place]))
    before, after = metrics_of(np.array(ranks)), metrics_of(np.array(data.draw(st.permutations(better))))
    assert all(after[name] >= before[name] - 1e-12 for name in before)
