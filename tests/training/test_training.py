"""The loss and one training step against the same written out plainly with autograd and unfused optimizers."""
import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from models import IISAN, IISANEncoder, MMProjector, PerPEFT, SASRec
from tests.conftest import make_trainer
from utils.data.histories import Histories
from utils.training.progress import Progress
from utils.training.sampling import Sampler

NUM_ITEMS, L2 = 25, 0.01


def test_steps_equal_plain_adamw_over_the_whole_model():
    torch.manual_seed(1)
    encoder = IISANEncoder(IISAN(image_dim=6, text_dim=5, num_states=3, bottleneck=2))
    model = PerPEFT(encoder, MMProjector(encoder.feature_dim, 8), SASRec(NUM_ITEMS, 8, 4, 1, 2, dropout_rate=0.0))
    model.double()  # Adam divides small gradients by themselves, which makes single precision's last bits large
    image_states, text_states = torch.randn(NUM_ITEMS, 3, 6).double(), torch.randn(NUM_ITEMS, 3, 5).double()
    random = np.random.default_rng(2)
    histories = Histories.of_lists([random.integers(1, NUM_ITEMS + 1, size=n).tolist() for n in (5, 2, 7, 3, 1)])
    sampler = Sampler(histories, NUM_ITEMS, np.zeros(5, int), [np.arange(1, NUM_ITEMS + 1)], batch_size=2, maxlen=4, seed=(0,))

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
        seq, *targets = (torch.from_numpy(batch.items[rows]) for rows in (batch.seq, batch.positives, batch.negatives))
        states = plain.sasrec.states_from_inputs(seq, table)
        loss = L2 * plain.sasrec.item_emb.weight.norm()
        for items, label in zip(targets, (1.0, 0.0)):
            logits = (states * table[items]).sum(-1)[seq != 0]
            loss = loss + F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
        loss.backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    expected = plain.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


BATCH = SimpleNamespace(group=0, items=np.array([0, 1]))


def test_the_loss_shown_is_that_of_the_losses_read():
    """On a GPU they are read at intervals only."""
    progress = Progress("global", 1, 100, torch.device("cuda"), Accelerator(cpu=True))
    epochs = progress.remaining()
    next(epochs)
    for step in range(1, 50):
        progress.add(step, BATCH, torch.tensor(1.0))
    assert math.isnan(progress.mean_loss)
    progress.add(50, BATCH, torch.tensor(2.0))
    assert progress.mean_loss == pytest.approx(51 / 50)


def test_state_says_how_far_it_has_come_and_the_earlier_of_equal_epochs_is_the_best():
    progress, again = (Progress("personalized", 3, 1, torch.device("cpu"), Accelerator(cpu=True)) for _ in range(2))
    best = []
    for _ in zip(progress.remaining(), range(2)):
        progress.add(1, BATCH, torch.tensor(1.0))
        best.append(progress.end_epoch({"valid_NDCG@20": 0.2}, skipped_steps=3))
    assert best == [True, False] and [row["skipped_steps"] for row in progress.rows] == [3, 0]
    again.load_state_dict(progress.state_dict())
    assert str(again) == str(progress) == "personalized epoch 3, step 0"
    assert again.rows == progress.rows
