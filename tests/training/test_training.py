"""The loss and one training step against the same written out plainly with autograd and unfused optimizers."""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from models import IISAN, IISANEncoder, MMProjector, PerPEFT, SASRec
from tests.conftest import make_trainer
from utils.data.histories import Histories
from utils.training.progress import Progress
from utils.training.sampling import Sampler
from utils.training.trainer import transition_loss

CPU = torch.device("cpu")
NUM_ITEMS, L2 = 25, 0.01


def test_loss_by_hand():
    positive, negative = torch.tensor([[9.0, 0.0, 2.0]]), torch.tensor([[9.0, 1.0, -1.0]])
    real = torch.tensor([[0.0, 1.0, 1.0]])  # the first position is padding

    def cross_entropy(logit, label):
        probability = 1 / (1 + np.exp(-logit))
        return -np.log(probability if label else 1 - probability)

    expected = (cross_entropy(0, 1) + cross_entropy(2, 1)) / 2 + (cross_entropy(1, 0) + cross_entropy(-1, 0)) / 2
    assert transition_loss(positive, negative, real, 2).item() == pytest.approx(expected, rel=1e-6)


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
    trainer = make_trainer(model, lambda items: (image_states[items - 1], text_states[items - 1]), 1e-2, 0.1, L2)
    for step in range(2):
        batch = sampler.batch(1, step)
        trainer.update(trainer.loss(batch))

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
    """On a GPU they are read at intervals only."""
    progress = Progress("global", epochs=1, steps=100, device=torch.device("meta"), accelerator=Accelerator(cpu=True))
    assert math.isnan(progress.mean_loss)
    batch = SimpleNamespace(group=0, items=np.array([0, 1]))
    for _ in progress.remaining():
        for step in range(1, 50):
            progress.add(step, batch, torch.tensor(1.0))
        assert math.isnan(progress.mean_loss)
        progress.add(50, batch, torch.tensor(2.0))
        assert progress.mean_loss == pytest.approx(51 / 50)
        break


def test_state_says_how_far_it_has_come_and_the_earlier_of_equal_epochs_is_the_best():
    progress = Progress("personalized", epochs=3, steps=1, device=CPU, accelerator=Accelerator(cpu=True))
    batch = SimpleNamespace(group=0, items=np.array([0, 1]))
    best = []
    for _, value in zip(progress.remaining(), (0.2, 0.2)):
        progress.add(1, batch, torch.tensor(1.0))
        best.append(progress.end_epoch({"valid_NDCG@20": value}, skipped_steps=3))
    assert best == [True, False] and [row["skipped_steps"] for row in progress.rows] == [3, 0]
    again = Progress("personalized", epochs=3, steps=1, device=CPU, accelerator=Accelerator(cpu=True))
    again.load_state_dict(progress.state_dict())
    assert str(again) == str(progress) == "personalized epoch 3, step 0"
    assert again.rows == progress.rows
