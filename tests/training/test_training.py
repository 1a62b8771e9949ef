"""The loss and one training step against the same written out plainly with autograd and unfused optimizers."""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models import IISAN, IISANEncoder, MMProjector, PerPEFT, SASRec
from utils.data.histories import Histories
from utils.training import trainer as training
from utils.training.sampling import Sampler
from utils.training.trainer import ItemTableGradient, Trainer, transition_loss

CPU = torch.device("cpu")
NUM_ITEMS, L2 = 25, 0.01


def test_loss_by_hand():
    positive, negative = torch.tensor([[9.0, 0.0, 2.0]]), torch.tensor([[9.0, 1.0, -1.0]])
    real = torch.tensor([[0.0, 1.0, 1.0]])  # the first position is padding

    def cross_entropy(logit, label):
        probability = 1 / (1 + np.exp(-logit))
        return -np.log(probability if label else 1 - probability)

    expected = (cross_entropy(0, 1) + cross_entropy(2, 1)) / 2 + (cross_entropy(1, 0) + cross_entropy(-1, 0)) / 2
    assert transition_loss(positive, negative, real).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("touched", [[3, 1, 7], [0, 5], []])
def test_item_table_gradient_equals_autograds(touched):
    torch.manual_seed(0)
    plain, ours = nn.Embedding(9, 4, padding_idx=0), nn.Embedding(9, 4, padding_idx=0)
    ours.load_state_dict(plain.state_dict())
    rows = torch.tensor(touched, dtype=torch.long)
    gradient = ItemTableGradient(ours, L2)
    for _ in range(2):  # the second time in the table that the first has left
        plain.zero_grad()
        ((plain(rows) ** 2).sum() + L2 * torch.linalg.vector_norm(plain.weight)).backward()
        ours.zero_grad()
        loss = (ours(rows) ** 2).sum() + gradient.penalty()
        if touched:
            loss.backward()
        gradient.complete()
        torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    assert gradient.penalty().item() == pytest.approx(L2 * float(np.linalg.norm(plain.weight.detach().numpy())), rel=1e-6)


def test_item_table_of_zeros_has_a_finite_gradient():
    table = nn.Embedding(3, 2)
    nn.init.zeros_(table.weight)
    gradient = ItemTableGradient(table, L2)
    (table(torch.tensor([1])).sum() + gradient.penalty()).backward()
    gradient.complete()
    assert torch.equal(table.weight.grad, torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))


def test_steps_equal_plain_adamw_over_the_whole_model():
    torch.manual_seed(1)
    encoder = IISANEncoder(IISAN(image_dim=6, text_dim=5, num_states=3, bottleneck=2))
    model = PerPEFT(encoder, MMProjector(encoder.feature_dim, 8), SASRec(NUM_ITEMS, 8, 4, 1, 2, dropout_rate=0.0))
    model.double()  # Adam divides small gradients by themselves, which makes single precision's last bits large
    image_states, text_states = torch.randn(NUM_ITEMS, 3, 6).double(), torch.randn(NUM_ITEMS, 3, 5).double()
    random = np.random.default_rng(2)
    histories = Histories.of_lists([random.integers(1, NUM_ITEMS + 1, size=n).tolist() for n in (5, 2, 7, 3, 1)])
    groups, candidates = np.zeros(5, dtype=np.int64), [np.arange(1, NUM_ITEMS + 1)]
    sampler = Sampler(histories, NUM_ITEMS, groups, candidates, batch_size=2, maxlen=4, seed=(0,))

    plain = copy.deepcopy(model)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    trainer = Trainer(model, learning_rate=1e-2, weight_decay=0.1, l2_emb=L2, device=CPU)
    for step in range(2):
        batch = sampler.batch(1, step)
        rows = torch.from_numpy(batch.items[1:] - 1)
        trainer.update(trainer.loss(batch, (image_states[rows], text_states[rows])))

        # the same over all items at once, with global item numbers and dense gradients
        features = torch.cat([torch.zeros(1, encoder.feature_dim), plain.encoder(image_states, text_states)])
        embeddings = plain.sasrec.item_emb(torch.arange(NUM_ITEMS + 1))  # the padding row stays zero
        table = 0.5 * plain.projectors[0](features) + embeddings  # [items + 1, hidden]
        local = (batch.seq, batch.positives, batch.negatives)
        seq, positives, negatives = (torch.from_numpy(batch.items[rows]) for rows in local)
        states = plain.sasrec.states_from_inputs(seq, table)
        real = seq != 0
        cross_entropy = nn.BCEWithLogitsLoss()
        positive_logits, negative_logits = ((states * table[items]).sum(-1)[real] for items in (positives, negatives))
        ones, zeros = torch.ones_like(positive_logits), torch.zeros_like(negative_logits)
        loss = cross_entropy(positive_logits, ones) + cross_entropy(negative_logits, zeros)
        (loss + L2 * plain.sasrec.item_emb.weight.norm()).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    expected = plain.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_the_loss_shown_is_that_of_the_losses_read():
    """On a GPU they are read now and then only."""
    log = training._LossLog("epoch", torch.device("meta"), total=6.0, steps=2)
    assert log.mean_so_far() == 3
    batch = SimpleNamespace(group=0, items=np.array([0, 1]))
    for step in range(49):
        log.add(step, batch, torch.tensor(1.0))
    assert log.mean_so_far() == 3
    log.add(49, batch, torch.tensor(1.0))
    assert log.mean_so_far() == pytest.approx((6 + 50) / 52)
    assert math.isnan(training._LossLog("epoch", torch.device("meta"), total=0.0, steps=0).mean_so_far())
