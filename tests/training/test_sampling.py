"""Batches hold what the paper trains on: whose turn it is, aligned transitions, negatives of the right group."""
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.common.errors import PerPEFTError
from utils.data.histories import Histories
from utils.training.sampling import Sampler, group_items

GROUPS = np.arange(70) % 3


def drawn_histories():
    random = np.random.default_rng(0)
    return [random.integers(1, 61, size).tolist() for size in random.integers(1, 16, len(GROUPS))]


def make_sampler(histories, groups, num_items=60, per_group=True, batch_size=16, maxlen=10, seed=(0, 3), mixed=False):
    train, groups = Histories.of_lists(histories), np.asarray(groups)
    candidates = group_items(train, groups, groups.max() + 1) if per_group else [np.arange(1, num_items + 1)]
    return Sampler(train, num_items, groups, candidates, batch_size, maxlen, seed, mixed)


def negatives_of_user_0(sampler, number):
    return sampler.negatives(np.zeros(number, dtype=np.int64), 0, np.random.default_rng(1))


@pytest.mark.parametrize("per_group", [True, False])
def test_negatives_are_uniform_over_the_candidates(per_group):
    """Chi-square over 40,000 draws for one user: the statistic of m cells has mean m - 1 and variance 2 (m - 1)."""
    histories = [[2, 4, 7, 9], [1, 3, 5, 6, 8, 10, 2], *[[5, 6]] * 9, [20, 21, 22, 23, 24, 25, 26]]  # 5 and 6 are popular
    sampler = make_sampler(histories, [0] * 11 + [1], 30, per_group)
    drawn = negatives_of_user_0(sampler, 40_000)
    allowed = [1, 3, 5, 6, 8, 10] if per_group else sorted(set(range(1, 31)) - {2, 4, 7, 9})
    assert set(drawn.tolist()) == set(allowed)
    counts = np.array([(drawn == item).sum() for item in allowed])
    expected, freedom = len(drawn) / len(allowed), len(allowed) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_groups_and_the_users_of_a_group_are_shuffled_in_each_epoch():
    plans = [make_sampler(drawn_histories(), GROUPS).plan(epoch) for epoch in (1, 2)]
    first, second = ([group for group, _ in plan] for plan in plans)
    assert sorted(first) != first != second
    first, second = ({frozenset(users.tolist()) for _, users in plan} for plan in plans)
    assert first != second


@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(1, 12), min_size=1, max_size=7)), min_size=1, max_size=9),
    st.integers(1, 6), st.integers(1, 4), st.integers(0, 5),
)  # fmt: skip
def test_any_epoch_meets_every_user_once_in_batches_of_transitions_negatives_and_distinct_items(drawn, maxlen, batch_size, seed):
    drawn.append((0, [1, 2]))  # somebody can be trained on
    groups, histories = zip(*drawn)
    sampler = make_sampler(histories, groups, 13, True, batch_size, maxlen, (seed,))
    plan = sampler.plan(1)
    assert len(plan) == sampler.num_batches
    for group in range(3):
        batches = [users.tolist() for own, users in plan if own == group]
        trainable = [user for user, history in enumerate(histories) if groups[user] == group and len(history) >= 2]
        assert sorted(sum(batches, [])) == trainable
        assert all(len(users) == batch_size for users in sorted(batches, key=len)[1:])
    for step, (group, users) in enumerate(plan):
        batch = sampler.batch(1, step)
        seq, positives, negatives = (batch.items[rows] for rows in (batch.seq, batch.positives, batch.negatives))
        of_group = {item for own, history in drawn if own == group for item in history}
        for row, user in enumerate(users):
            history = histories[user]
            assert groups[user] == group == batch.group
            assert seq[row].tolist() == ([0] * maxlen + history[:-1])[-maxlen:]
            assert positives[row].tolist() == ([0] * maxlen + history[1:])[-maxlen:]
            assert not negatives[row][seq[row] == 0].any()
            allowed = of_group - set(history) or set(range(1, 14)) - set(history)  # else the user has all of the group's items
            assert set(negatives[row][seq[row] != 0].tolist()) <= allowed
        used = np.concatenate([seq.ravel(), positives.ravel(), negatives.ravel(), [0]])
        assert batch.items.tolist() == sorted(set(used.tolist()))  # 0 first; nothing twice, nothing that is not used


MANY = list(range(1, 201))


@pytest.mark.parametrize(
    ("histories", "num_items", "others"),
    [
        ([MANY[:-1], MANY[-1:], [300]], 500, [200]),
        ([MANY[:-2], MANY[-2:], [300]], 500, [199, 200]),
        ([[1, 2, 3], [3, 2], [8, 9]], 10, [4, 5, 6, 7, 8, 9, 10]),  # all of the group's: any other item
    ],
)
def test_user_with_nearly_all_of_the_groups_items_gets_the_others(histories, num_items, others):
    drawn = negatives_of_user_0(make_sampler(histories, [0, 0, 1], num_items), 2000)
    shares = [(drawn == item).mean() for item in others]
    assert sum(shares) == pytest.approx(1) and shares == pytest.approx([1 / len(others)] * len(others), abs=0.06)


@pytest.mark.parametrize("histories", [[[1], [2]], [[1, 2, 3, 2], [1]]])
def test_nobody_to_train_on_is_an_error(histories):
    with pytest.raises(PerPEFTError, match="no user left to train on.*two training interactions"):
        make_sampler(histories, [0] * len(histories), 3)


def same(a, b):
    return all(np.array_equal(own, other) for own, other in zip(vars(a).values(), vars(b).values()))


def test_a_batch_depends_on_seed_epoch_and_step_alone():
    histories = drawn_histories()
    first, again = make_sampler(histories, GROUPS), make_sampler(histories, GROUPS)
    forwards = {(epoch, step): first.batch(epoch, step) for epoch in (1, 2) for step in range(first.num_batches)}
    for position in sorted(forwards, reverse=True):  # in another order, and each drawn twice
        assert same(again.batch(*position), forwards[position]) and same(again.batch(*position), forwards[position])
    for seed in ((1, 3), (0, 1)):
        other = make_sampler(histories, GROUPS, seed=seed)
        assert not any(same(other.batch(*position), batch) for position, batch in forwards.items())


def test_no_two_draws_of_a_run_share_a_random_stream():
    """Zeros at the end of a numpy seed change nothing, so the stream of (epoch) must not be that of (epoch, step 0)."""
    sampler = make_sampler(drawn_histories(), GROUPS)
    with mock.patch.object(np.random, "default_rng", wraps=np.random.default_rng) as made:
        for epoch in (1, 2):
            for step in range(sampler.num_batches):
                sampler.batch(epoch, step)
    streams = {tuple(np.random.default_rng(call.args[0]).integers(2**63, size=4)) for call in made.call_args_list}
    assert len(streams) == len(made.call_args_list) == 2 * (1 + sampler.num_batches)


def test_mixed_negatives_come_from_the_groups_items_and_from_all_by_halves():
    histories = [[1, 2, 3], list(range(1, 21)), [50, 51]]  # the group has a fifth of 100 items
    plain, mixed = (negatives_of_user_0(make_sampler(histories, [0, 0, 1], 100, mixed=on), 20_000) for on in (False, True))
    assert not set(mixed.tolist()) & {1, 2, 3}
    expected = 0.5 + 0.5 * 17 / 97  # from the group, or from all and in the group by chance
    assert abs((mixed <= 20).mean() - expected) < 4 * (expected * (1 - expected) / len(mixed)) ** 0.5
    assert (plain <= 20).all()
    assert 0.48 < (plain == mixed).mean() < 0.54  # the other half is drawn again, from all items
