"""Full ranking agrees with a naive loop over users and candidates, and doubt (ties, NaN) counts against the model."""
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from models import SASRec
from tests.plain import naive_rank, plain_ranks, with_vectors
from utils.data.histories import Histories, leave_last_out
from utils.training import evaluation
from utils.training.evaluation import Evaluator, Ranks, rank_targets

CPU = torch.device("cpu")
ITEMS, USERS = 40, 50


@given(st.data())
def test_ranks_equal_a_naive_loop_for_any_histories_however_many_users_are_scored_at_once(data):
    """Small whole numbers: dot products are exact, and there are many ties."""
    items = data.draw(st.integers(1, 8))
    histories = data.draw(st.lists(st.lists(st.integers(1, items), max_size=6), max_size=6))
    users = np.array(data.draw(st.permutations(range(len(histories)))), dtype=np.int64)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    targets = random.integers(1, items + 1, len(users))
    states, table = (torch.from_numpy(random.integers(-2, 3, (rows, 2))).float() for rows in (len(users), items + 1))
    with mock.patch.object(evaluation, "SCORES_AT_ONCE", data.draw(st.sampled_from((1, 20, 2**24)))):
        found = rank_targets(states, table, targets, Histories.of_lists(histories), users)
    scores = (states @ table.T).tolist()
    assert found.tolist() == [naive_rank(*row) for row in zip(scores, targets, [set(histories[user]) for user in users])]


@pytest.mark.parametrize("num_items", [31, 100, 1003])
def test_constant_scores_are_no_hit(num_items):
    """A model that says the same of every item must not look good: every other candidate ties, in rounded arithmetic too."""
    torch.manual_seed(0)
    table = torch.randn(1, 32).expand(num_items + 1, 32).contiguous()
    histories = Histories.of_lists([[1, 2]] * 37)
    ranks = rank_targets(torch.randn(37, 32), table, np.arange(3, 40) % 28 + 3, histories, np.arange(37))
    assert ranks.tolist() == [num_items - 3] * 37


@pytest.mark.parametrize("where", ["everywhere", "target", "others"])
def test_scores_that_are_nan_count_against_the_model(where):
    table = torch.arange(51, 0, -1, dtype=torch.float32)[:, None]
    table[{"everywhere": slice(None), "target": slice(1, 2), "others": slice(2, None)}[where]] = float("nan")
    rank = rank_targets(torch.ones(1, 1), table, np.array([1]), Histories.of_lists([[50]]), np.array([0]))[0]
    assert rank >= 48  # 50 items, less the target, less one in the history


def test_metrics_by_hand():
    gains = [1.0, 1 / np.log2(3), 1 / np.log2(11), 1 / np.log2(12), 1 / np.log2(21), 1 / np.log2(31)]
    expected = {
        "valid_HR@10": 3 / 8, "valid_HR@20": 5 / 8, "valid_HR@30": 6 / 8,
        "valid_NDCG@10": sum(gains[:3]) / 8, "valid_NDCG@20": sum(gains[:5]) / 8, "valid_NDCG@30": sum(gains) / 8,
    }  # fmt: skip
    expected |= dict.fromkeys([name.replace("valid", "test") for name in expected], 1.0)
    metrics = Ranks(np.arange(8), np.array([0, 1, 9, 10, 19, 29, 30, 5000]), np.zeros(8, int)).metrics()
    assert list(metrics) == list(expected) and metrics == pytest.approx(expected, rel=1e-12)


class Vectors:
    """A model and an item source in one: items' projected vectors are drawn, one table a group."""

    def __init__(self, vectors):
        torch.manual_seed(1)
        self.sasrec = SASRec(ITEMS, hidden_units=8, maxlen=4, num_heads=2).eval()
        self.eval, self.vectors, self.num_items, self.encoded = self.sasrec.eval, vectors, ITEMS, []

    def reading_order(self):
        return np.random.default_rng(0).permutation(ITEMS) + 1

    def fetch(self, items, device):
        return (torch.from_numpy(items),)

    def item_vectors(self, group, inputs):
        self.encoded.append(group)
        return self.vectors[group][torch.cat([torch.zeros(1, dtype=torch.long), inputs[0]])]


@pytest.fixture
def example():
    random = np.random.default_rng(0)
    histories = [random.integers(1, ITEMS + 1, random.integers(1, 9)).tolist() for _ in range(USERS)]
    vectors = torch.randn(4, ITEMS + 1, 8, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(histories=histories, groups=random.integers(0, 3, USERS), model=Vectors(vectors))


def make_evaluator(example, accelerator=None):
    split = leave_last_out(Histories.of_lists(example.histories))
    return Evaluator(split, example.model, CPU, accelerator or Accelerator(cpu=True))


def test_every_user_is_ranked_as_a_naive_loop_does_by_their_own_groups_vectors(example, monkeypatch):
    monkeypatch.setattr(evaluation, "USERS_AT_ONCE", 7)
    evaluator = make_evaluator(example)
    found = evaluator.ranks(example.model, example.groups)
    model_of = [with_vectors(example.model.sasrec, example.model.vectors[group]) for group in example.groups]
    expected = plain_ranks(model_of.__getitem__, dict(enumerate(example.histories)))
    assert 0 < len(expected) < USERS  # users without held-out items are not evaluated
    ranks = zip(found.valid.tolist(), found.test.tolist())
    assert dict(zip(found.users.tolist(), ranks)) == expected
    assert sorted(example.model.encoded) == [0, 1, 2]  # once a group, and not for a group without users
    # with everybody in one group the ranks are others, so the groups did matter above
    assert evaluator.ranks(example.model, np.zeros(USERS, int)).test.tolist() != found.test.tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_ranks_that_share_the_work_encode_every_item_once(size, example, monkeypatch):
    """The shares of all ranks, summed, are one process's result; 40 items in chunks of 7 are fewer than 40 ranks."""
    monkeypatch.setattr(evaluation, "ITEMS_AT_ONCE", 7)
    shares = []
    for rank in range(size):
        sharer = SimpleNamespace(process_index=rank, num_processes=size, reduce=lambda tensor, how: tensor)
        shares.append(make_evaluator(example, sharer).item_table(example.model, 1) - example.model.sasrec.item_emb.weight)
    torch.testing.assert_close(sum(shares), 0.5 * example.model.vectors[1], rtol=0, atol=1e-5)
