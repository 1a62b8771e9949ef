"""Full ranking agrees with a naive loop over users and candidates, and doubt (ties, NaN) counts against the model."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from models import SASRec
from tests.plain import naive_rank, plain_ranks, plain_state, with_vectors
from utils.data.histories import Histories, leave_last_out
from utils.training import evaluation
from utils.training.evaluation import Evaluator, last_states, metrics_of, rank_targets

CPU = torch.device("cpu")
ITEMS = 40


def integer_vectors(random, *shape):
    """Small whole numbers: dot products are exact, and there are many ties."""
    return torch.from_numpy(random.integers(-2, 3, shape).astype(np.float32))


# ---------------------------------------------------------------- one ranking


@pytest.mark.parametrize("scores_at_once", [1, 7 * 41, 2**24])
def test_ranks_equal_a_naive_loop_however_many_users_are_scored_at_once(monkeypatch, scores_at_once):
    monkeypatch.setattr(evaluation, "SCORES_AT_ONCE", scores_at_once)
    random = np.random.default_rng(0)
    histories = [random.integers(1, ITEMS + 1, random.integers(0, 12)).tolist() for _ in range(60)]
    users = random.permutation(60)[:45]
    targets = random.integers(1, ITEMS + 1, 45)
    states, inputs = integer_vectors(random, 45, 4), integer_vectors(random, ITEMS + 1, 4)
    found = rank_targets(states, inputs, targets, Histories.of_lists(histories), users)
    expected = [
        naive_rank((inputs @ states[row]).tolist(), targets[row], set(histories[user])) for row, user in enumerate(users)
    ]
    assert found.tolist() == expected
    assert len(set(expected)) > 10


@settings(max_examples=100)
@given(st.data())
def test_ranks_equal_a_naive_loop_for_any_histories(data):
    items = data.draw(st.integers(1, 8))
    histories = data.draw(st.lists(st.lists(st.integers(1, items), max_size=6), max_size=5))
    targets = data.draw(st.lists(st.integers(1, items), min_size=len(histories), max_size=len(histories)))
    scores = data.draw(st.lists(st.integers(-2, 2), min_size=items + 1, max_size=items + 1))
    inputs = torch.tensor(scores, dtype=torch.float32)[:, None]
    found = rank_targets(
        torch.ones(len(histories), 1), inputs, np.array(targets), Histories.of_lists(histories), np.arange(len(histories))
    )
    assert found.tolist() == [naive_rank(scores, target, set(own)) for target, own in zip(targets, histories)]


@pytest.mark.parametrize("num_items", [31, 100, 1003])
def test_constant_scores_are_no_hit(num_items):
    """A model that says the same of every item must not look good: every other candidate ties, in rounded arithmetic too."""
    torch.manual_seed(0)
    inputs = torch.randn(1, 32).expand(num_items + 1, 32).contiguous()
    histories = Histories.of_lists([[1, 2]] * 37)
    ranks = rank_targets(torch.randn(37, 32), inputs, np.arange(3, 40) % 28 + 3, histories, np.arange(37))
    assert ranks.tolist() == [num_items - 3] * 37


@pytest.mark.parametrize("where", ["everywhere", "target", "others"])
def test_scores_that_are_nan_count_against_the_model(where):
    inputs = torch.arange(51, 0, -1, dtype=torch.float32)[:, None]
    if where == "target":
        inputs[1] = float("nan")
    elif where == "others":
        inputs[2:] = float("nan")
    state = torch.full((1, 1), float("nan") if where == "everywhere" else 1.0)
    rank = rank_targets(state, inputs, np.array([1]), Histories.of_lists([[50]]), np.array([0]))[0]
    assert rank >= 48  # 50 items, less the target, less one in the history


def test_metrics_by_hand():
    metrics = metrics_of(np.array([0, 1, 9, 10, 19, 29, 30, 5000]))
    assert list(metrics) == ["HR@10", "HR@20", "HR@30", "NDCG@10", "NDCG@20", "NDCG@30"]
    gains = [1.0, 1 / np.log2(3), 1 / np.log2(11), 1 / np.log2(12), 1 / np.log2(21), 1 / np.log2(31)]
    expected = {
        "HR@10": 3 / 8, "HR@20": 5 / 8, "HR@30": 6 / 8,
        "NDCG@10": sum(gains[:3]) / 8, "NDCG@20": sum(gains[:5]) / 8, "NDCG@30": sum(gains) / 8,
    }  # fmt: skip
    assert metrics == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------- all users


def make_sasrec():
    torch.manual_seed(1)
    return SASRec(ITEMS, hidden_units=8, maxlen=4, num_heads=2).eval()


def rank_example(seed=0, num_users=50):
    random = np.random.default_rng(seed)
    histories = [random.integers(1, ITEMS + 1, random.integers(1, 9)).tolist() for _ in range(num_users)]
    groups = random.integers(0, 3, num_users)
    vectors = torch.randn(4, ITEMS + 1, 8, generator=torch.Generator().manual_seed(seed))
    return histories, groups, vectors


class Vectors:
    """A model and an item source in one: items' projected vectors are drawn, one table a group."""

    def __init__(self, sasrec, vectors, num_groups=None):
        self.sasrec, self.vectors, self.num_groups = sasrec, vectors, num_groups or len(vectors)
        self.num_items = vectors.shape[1] - 1
        self.encoded = []

    def reading_order(self):
        return np.random.default_rng(0).permutation(self.num_items) + 1

    def fetch(self, items, device):
        return (torch.from_numpy(items),)

    def item_vectors(self, group, inputs):
        self.encoded.append(group)
        return self.vectors[group][torch.cat([torch.zeros(1, dtype=torch.long), inputs[0]])]


def ranks_of(model, histories, groups, items_at_once=256):
    split = leave_last_out(Histories.of_lists(histories))
    return Evaluator(split, model, CPU, Accelerator(cpu=True), items_at_once).ranks(model, groups)


def test_every_user_is_ranked_as_a_naive_loop_does_by_their_own_groups_vectors():
    histories, groups, vectors = rank_example()
    model = Vectors(make_sasrec(), vectors)
    found = ranks_of(model, histories, groups)
    expected = plain_ranks(lambda user: with_vectors(model.sasrec, vectors[groups[user]]), dict(enumerate(histories)))
    assert 0 < len(expected) < 50  # users without held-out items are not evaluated
    ranks = zip(found.valid.tolist(), found.test.tolist())
    assert dict(zip(found.users.tolist(), ranks)) == expected
    assert sorted(model.encoded) == [0, 1, 2]  # once a group, and not for a group without users
    # with everybody in one group the ranks are others, so the groups did matter above
    assert ranks_of(model, histories, np.zeros(50, int)).test.tolist() != found.test.tolist()


def test_user_whose_group_has_no_adapter_is_an_error_and_not_a_perfect_hit():
    histories, _, vectors = rank_example()
    with pytest.raises(ValueError, match="a user is in group 5, but the model has 3 groups"):
        ranks_of(Vectors(make_sasrec(), vectors, 3), histories, np.full(50, 5))


@torch.no_grad()
def test_last_states_are_read_in_portions_from_the_last_maxlen_items():
    sasrec = make_sasrec()
    histories, _, vectors = rank_example(3)
    users = np.array([5, 0, 17, 5, 30])
    inputs = sasrec.item_inputs(vectors[0])
    found = last_states(sasrec, inputs, Histories.of_lists(histories), users, users_at_once=2)
    for row, user in enumerate(users):
        expected = plain_state(with_vectors(sasrec, vectors[0]), histories[user])
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_ranks_that_share_the_work_encode_every_item_once_and_rank_every_user(size):
    """The shares of all ranks, summed, are one process's result; 40 items in chunks of 7 are fewer than 40 ranks."""
    histories, groups, vectors = rank_example()
    shares = []
    for rank in range(size):
        model = Vectors(make_sasrec(), vectors)
        sharer = SimpleNamespace(process_index=rank, num_processes=size, reduce=lambda tensor, how: tensor)
        evaluator = Evaluator(leave_last_out(Histories.of_lists(histories)), model, CPU, sharer, items_at_once=7)
        shares.append(evaluator.item_table(model, 1) - model.sasrec.item_emb.weight)
    torch.testing.assert_close(sum(shares), 0.5 * vectors[1], rtol=0, atol=1e-5)
