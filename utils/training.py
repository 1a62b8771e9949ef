"""The training step and the loop over a stage's epochs; the same for global and personalized PEFT."""
import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from models import PerPEFT
from utils.checkpoints import ResumeState
from utils.devices import autocast_for
from utils.errors import PerPEFTError
from utils.evaluation import ItemSource
from utils.sampling import Batch, Sampler

SELECTION_METRIC = "valid_NDCG@20"
STEPS_BETWEEN_READS = {"cpu": 1}  # how often the loss is read; on a GPU every read waits for the device
DEFAULT_STEPS_BETWEEN_READS = 50


def transition_loss(positive_logits: torch.Tensor, negative_logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of positives (1) plus that of negatives (0), each a mean over real positions.

    Args:
        positive_logits, negative_logits: [batch, time]
        real: 1 where the history has an item, 0 at padding, [batch, time]
    """
    # -log(sigmoid(x)) = softplus(-x), -log(1 - sigmoid(x)) = softplus(x)
    terms = F.softplus(-positive_logits.float()) + F.softplus(negative_logits.float())  # [batch, time]
    return (terms * real).sum() / real.sum()


class Trainer:
    """One model with its two optimizers.

    SASRec and the projectors are in one AdamW, every group's adapter in another. A step gives gradients to the batch's
    adapter and projector alone; AdamW leaves parameters without gradient as they are, weight decay included.

    Args:
        model: on its device.
        learning_rate, weight_decay: of both optimizers.
        l2_emb: weight of the L2 norm of the item embeddings in the loss.
        device: where the model lies.
    """

    def __init__(self, model: PerPEFT, learning_rate: float, weight_decay: float, l2_emb: float, device: torch.device):
        self.model = model
        self.device = device
        self._l2_emb = l2_emb
        self._autocast = autocast_for(device)
        recommender = [*model.sasrec.parameters(), *model.projectors.parameters()]
        options = {"lr": learning_rate, "weight_decay": weight_decay, "fused": device.type in ("cpu", "cuda")}
        self.optimizers = [
            torch.optim.AdamW(recommender, **options),
            torch.optim.AdamW(list(model.encoder.adapter_parameters()), **options),
        ]
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def loss(self, batch: Batch, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The loss of one batch.

        Args:
            batch: from the sampler.
            inputs: what the encoder takes of items `batch.items[1:]`.
        """
        model = self.model
        seq, positives, negatives, items = (
            torch.from_numpy(array).to(self.device, non_blocking=True)
            for array in (batch.seq, batch.positives, batch.negatives, batch.items)
        )
        with self._autocast():
            item_vectors = model.item_vectors(batch.group, inputs)  # [rows, hidden]
            positive_logits, negative_logits = model.sasrec(seq, positives, negatives, item_vectors, items)
        loss = transition_loss(positive_logits, negative_logits, (seq != 0).float())
        return loss + self._l2_emb * torch.linalg.vector_norm(model.sasrec.item_emb.weight)

    def update(self, loss: torch.Tensor) -> None:
        """Backward pass and one step of both optimizers."""
        self.scaler.scale(loss).backward()
        self.apply_gradients()

    def apply_gradients(self) -> None:
        """One step of both optimizers with the gradients that are there, which are then cleared."""
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training, torch's random state included."""
        return {
            "sasrec": self.model.sasrec.state_dict(),
            "projectors": self.model.projectors.state_dict(),
            "adapters": [parameter.detach() for parameter in self.model.encoder.adapter_parameters()],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.model.sasrec.load_state_dict(state["sasrec"])
        self.model.projectors.load_state_dict(state["projectors"])
        for parameter, saved in zip(self.model.encoder.adapter_parameters(), state["adapters"], strict=True):
            parameter.copy_(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"], self.device)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that receives SIGINT or SIGTERM instead of their breaking off whatever runs; a second one does break off."""
    requests: list[int] = []

    def remember(number: int, _frame: object) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _LossLog:
    """Sums losses without making the host wait for the device at every step."""

    def __init__(self, device: torch.device):
        self._interval = STEPS_BETWEEN_READS.get(device.type, DEFAULT_STEPS_BETWEEN_READS)
        self._unread: list[torch.Tensor] = []
        self._batches: list[Batch] = []
        self.total = 0.0

    def add(self, loss: torch.Tensor, batch: Batch, step: int) -> None:
        """Note one step's loss; now and then all of them are read, and the run stops at one that is no number."""
        self._unread.append(loss.detach())
        self._batches.append(batch)
        if len(self._unread) >= self._interval:
            self.read(step)

    def read(self, step: int) -> None:
        """Read what is unread. `step` is the number of the last step noted."""
        if not self._unread:
            return
        losses = torch.stack(self._unread).double().cpu().numpy()
        wrong = np.flatnonzero(~np.isfinite(losses))
        if len(wrong):
            batch = self._batches[wrong[0]]
            raise PerPEFTError(
                f"the loss is {losses[wrong[0]]} at step {step - len(losses) + int(wrong[0]) + 2} of this epoch, in a batch of "
                f"group {batch.group} with items {', '.join(map(str, batch.items[1:11]))}, ...; what was saved before is kept. "
                "Look at these items, try a smaller --lr, or another device, and start the same command again."
            )
        self.total += float(losses.sum())
        self._unread, self._batches = [], []


def train_stage(
    stage: str,
    trainer: Trainer,
    sampler: Sampler,
    source: ItemSource,
    epochs: int,
    evaluate: Callable[[], dict[str, float]],
    keep_best: Callable[[], None],
    report: Callable[[list[dict[str, Any]]], None],
    resume: ResumeState,
    save_every: int,
) -> list[dict[str, Any]]:
    """Train for some epochs, evaluating after each; continue where `resume` left off.

    Args:
        stage: "global" or "personalized", the name in reports.
        trainer, sampler, source: model, batches, and item inputs.
        epochs: how many.
        evaluate: gives the metrics `valid_..` and `test_..` of the present model.
        keep_best: called when the present model is the best so far by valid NDCG@20.
        report: called with the rows of all finished epochs.
        resume: where the state is kept; saved after every epoch and every `save_every` steps.
        save_every: steps between saves.
    Returns:
        a row an epoch: stage, epoch, train_loss, seconds, metrics.
    Raises:
        PerPEFTError: the loss or a metric is not finite.
        KeyboardInterrupt: SIGINT or SIGTERM came; the state is saved.
    """
    model, device = trainer.model, trainer.device
    state = resume.load() or {"epoch": 1, "step": 0, "loss": 0.0, "seconds": 0.0, "rows": []}
    rows, epoch, step = state["rows"], state["epoch"], state["step"]
    if "trainer" in state:
        trainer.load_state_dict(state["trainer"])

    def save(**position: Any) -> None:
        resume.save({**position, "rows": rows, "trainer": trainer.state_dict()})

    while epoch <= epochs:
        begun = time.monotonic() - state["seconds"]
        log = _LossLog(device)
        log.total = state["loss"]
        model.train()
        bar = tqdm(total=sampler.num_batches, initial=step, desc=f"{stage} {epoch}/{epochs}", unit="step", disable=None)
        with bar, stop_requests() as requests:
            while step < sampler.num_batches:
                batch = sampler.batch(epoch, step)
                loss = trainer.loss(batch, source.fetch(batch.items[1:], device))
                step += 1
                log.add(loss, batch, step - 1)  # on CPU this stops at a bad loss before the weights take it in
                trainer.update(loss)
                bar.update()
                if not step % 20 and not bar.disable:
                    bar.set_postfix(loss=f"{log.total / max(1, step):.4f}", refresh=False)
                if requests or not step % save_every or step == sampler.num_batches:
                    log.read(step - 1)
                    save(epoch=epoch, step=step, loss=log.total, seconds=time.monotonic() - begun)
                if requests:
                    raise KeyboardInterrupt
        model.eval()
        metrics = evaluate()
        if not all(np.isfinite(value) for value in metrics.values()):
            raise PerPEFTError(f"the metrics of {stage} epoch {epoch} are not finite; try a smaller --lr")
        row = {"stage": stage, "epoch": epoch, "train_loss": log.total / step, "seconds": time.monotonic() - begun, **metrics}
        if not rows or row[SELECTION_METRIC] > max(earlier[SELECTION_METRIC] for earlier in rows):
            keep_best()
        rows.append(row)
        epoch, step, state = epoch + 1, 0, {"loss": 0.0, "seconds": 0.0}
        # The best weights are on disk before the state that says so: a kill between the two repeats the same epoch.
        save(epoch=epoch, step=0, loss=0.0, seconds=0.0)
        report(rows)
    return rows


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the best epoch by valid NDCG@20; the earlier of equals."""
    return max(rows, key=lambda row: row[SELECTION_METRIC])
