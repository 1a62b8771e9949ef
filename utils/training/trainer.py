"""The training step and the loop over a stage's epochs; the same for global and personalized PEFT."""
import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from models import PerPEFT
from utils.common.devices import autocast_for, has_fused_adamw, is_out_of_memory
from utils.common.errors import PerPEFTError
from utils.training.checkpoints import ResumeState
from utils.training.evaluation import ItemSource
from utils.training.processes import Processes
from utils.training.sampling import Batch, Sampler

SELECTION_METRIC = "valid_NDCG@20"
STEPS_BETWEEN_READS = {"cpu": 1}  # how often the loss is read; on a GPU every read waits for the device
DEFAULT_STEPS_BETWEEN_READS = 50


def transition_loss(
    positive_logits: torch.Tensor, negative_logits: torch.Tensor, real: torch.Tensor, count: int | None = None
) -> torch.Tensor:
    """Binary cross-entropy of positives (1) plus that of negatives (0), each a mean over real positions.

    Args:
        positive_logits, negative_logits: [batch, time]
        real: 1 where the history has an item, 0 at padding, [batch, time]
        count: what the sum is divided by in place of the number of real positions, for a part of a batch.
    """
    # -log(sigmoid(x)) = softplus(-x), -log(1 - sigmoid(x)) = softplus(x)
    terms = F.softplus(-positive_logits.float()) + F.softplus(negative_logits.float())  # [batch, time]
    return (terms * real).sum() / (real.sum() if count is None else count)


class ItemTableGradient:
    """The gradient of a large embedding table, made in two passes over it.

    A step touches some hundred rows, but the loss's L2 norm and AdamW need all of them. Autograd would fill two tables of zeros
    and add three; here the few rows' gradients stay sparse until one table, kept from step to step, takes up both terms.

    Args:
        embedding: the table; its lookups give sparse gradients from now on.
        l2: weight of the table's L2 norm in the loss.
    """

    def __init__(self, embedding: torch.nn.Embedding, l2: float):
        embedding.sparse = True
        self._weight = embedding.weight
        self._l2 = l2
        self._norm: torch.Tensor | None = None
        self._dense: torch.Tensor | None = None

    def penalty(self) -> torch.Tensor:
        """The L2 term of the loss, a number without gradient; `complete` adds its gradient."""
        self._norm = torch.linalg.vector_norm(self._weight.detach())
        return self._l2 * self._norm

    @torch.no_grad()
    def complete(self) -> None:
        """Turn the rows' gradients of the last backward pass into the whole table's, the L2 term's included."""
        if self._dense is None or self._dense.device != self._weight.device:
            self._dense = torch.empty_like(self._weight)
        slope = self._l2 / self._norm.clamp_min(torch.finfo(self._norm.dtype).tiny)  # of l2 * |w|: l2 * w / |w|
        torch.mul(self._weight, slope, out=self._dense)
        if self._weight.grad is not None:
            self._dense.add_(self._weight.grad)
        self._weight.grad = self._dense


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
        self._item_table = ItemTableGradient(model.sasrec.item_emb, l2_emb)
        self._autocast = autocast_for(device)
        recommender = [*model.sasrec.parameters(), *model.projectors.parameters()]
        options = {"lr": learning_rate, "weight_decay": weight_decay, "fused": has_fused_adamw(device)}
        adapters = list(model.encoder.adapter_parameters())  # none where the foundation model is frozen
        self.optimizers = [torch.optim.AdamW(parameters, **options) for parameters in (recommender, adapters) if parameters]
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
        self._one = torch.ones((), device=device)
        self._skipped_steps: torch.Tensor | int = 0  # on the device, so that counting does not wait for it

    @property
    def skipped_steps(self) -> int:
        """Steps so far that left weights as they were because a gradient overflowed in fp16; the scaler then scales less."""
        return int(self._skipped_steps)

    def is_finite(self) -> bool:
        """Whether no weight that is trained, and nothing that the optimizers keep of it, is infinite or NaN."""
        tensors = [
            tensor
            for optimizer in self.optimizers
            for parameter in optimizer.param_groups[0]["params"]
            for tensor in (parameter.detach(), *optimizer.state.get(parameter, {}).values())
        ]
        return bool(torch.nn.utils.get_total_norm(tensors, math.inf).isfinite())

    def part(self, batch: Batch) -> Batch:
        """What this process takes of a batch: all."""
        return batch

    def loss(self, batch: Batch, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The loss of one batch.

        Args:
            batch: from the sampler.
            inputs: what the encoder takes of items `batch.items[1:]`.
        """
        return transition_loss(*self.logits(batch, inputs)) + self._item_table.penalty()

    def logits(
        self, batch: Batch, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of positives and of negatives, and 1 where the history has an item, [batch, time] each."""
        model = self.model
        seq, positives, negatives, items = (
            torch.from_numpy(array).to(self.device, non_blocking=True)
            for array in (batch.seq, batch.positives, batch.negatives, batch.items)
        )
        with self._autocast():
            item_vectors = model.item_vectors(batch.group, inputs)  # [rows, hidden]
            positive_logits, negative_logits = model.sasrec(seq, positives, negatives, item_vectors, items)
        return positive_logits, negative_logits, (seq != 0).float()

    def update(self, loss: torch.Tensor) -> None:
        """Backward pass and one step of both optimizers."""
        self.scaler.scale(loss).backward()
        self.apply_gradients()

    def apply_gradients(self) -> None:
        """One step of both optimizers with the gradients that are there, which are then cleared."""
        scale = self.scaler.scale(self._one)
        self.scaler.unscale_(self.optimizers[0])  # the L2 term's gradient is not scaled
        self._item_table.complete()
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():  # the scale shrinks after an overflow, and only then
            self._skipped_steps += self.scaler.scale(self._one) < scale

    def state_dict(self) -> dict[str, Any]:
        """All that changes in training, torch's random state included."""
        return {
            "sasrec": self.model.sasrec.state_dict(),
            "projectors": self.model.projectors.state_dict(),
            "adapters": [parameter.detach() for parameter in self.model.encoder.adapter_parameters()],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "skipped_steps": self.skipped_steps,
            **self.random_states(),
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
        if state["scaler"]:  # empty where the state comes from a device without a scaler
            self.scaler.load_state_dict(state["scaler"])
        self._skipped_steps = state["skipped_steps"]
        self.load_random_states(state)

    def random_states(self) -> dict[str, Any]:
        """Torch's random states, on the CPU and where the model lies."""
        return {
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_random_states(self, states: dict[str, Any]) -> None:
        """Continue from what `random_states` gave."""
        self._tell_of_other_number(1 + len(states.get("others", [])), 1)
        torch.set_rng_state(states["random"])
        if self.device.type == "cuda" and states["cuda_random"] is not None:
            torch.cuda.set_rng_state(states["cuda_random"], self.device)

    @staticmethod
    def _tell_of_other_number(then: int, now: int) -> None:
        if then != now:
            print(f"number of processes: {then} before, {now} now; dropout is drawn differently from here on", flush=True)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that receives SIGINT or SIGTERM instead of their breaking off whatever runs; a second one does break off.

    Raises:
        KeyboardInterrupt: at the end of the block, with the signal's number, if one came.
    """
    requests: list[int] = []

    def remember(number: int, _frame: object) -> None:
        if requests:
            raise KeyboardInterrupt(number)
        requests.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if requests:
        raise KeyboardInterrupt(requests[0])


def _signal_to_heed(requests: list[int], processes: Processes, step: int) -> int:
    """A signal that this process was sent, or any other: all look after the same steps, and so stop after the same one."""
    own = requests[0] if requests else 0
    if processes.size == 1:
        return own
    interval = STEPS_BETWEEN_READS.get(processes.device.type, DEFAULT_STEPS_BETWEEN_READS)
    return 0 if step % interval else processes.signal_of_any(own)


class _LossLog:
    """Sums an epoch's losses without making the host wait for the device at every step.

    Args:
        epoch: in words, for the message.
        device: where the losses lie.
        total, steps: sum of the losses of the steps before, and how many there were.
    """

    def __init__(self, epoch: str, device: torch.device, total: float, steps: int):
        self._epoch = epoch
        self._interval = STEPS_BETWEEN_READS.get(device.type, DEFAULT_STEPS_BETWEEN_READS)
        self._unread: list[tuple[int, Batch, torch.Tensor]] = []
        self.total = total
        self._steps = steps

    def mean_so_far(self) -> float:
        """Of the losses that are read; NaN before the first."""
        return self.total / self._steps if self._steps else math.nan

    def add(self, step: int, batch: Batch, loss: torch.Tensor) -> None:
        """Note one step's loss; now and then all of them are read."""
        self._unread.append((step, batch, loss.detach()))
        if len(self._unread) >= self._interval:
            self.read()

    def read(self) -> None:
        """Read what is unread.

        Raises:
            PerPEFTError: a loss is not finite; says which.
        """
        if not self._unread:
            return
        losses = torch.stack([loss for _, _, loss in self._unread]).cpu().double().numpy()
        for (step, batch, _), loss in zip(self._unread, losses):
            if not np.isfinite(loss):
                raise _not_finite(f"the loss is {loss}", self._epoch, step, batch)
        self.total += float(losses.sum())
        self._steps += len(losses)
        self._unread = []


def _not_finite(what: str, epoch: str, step: int, batch: Batch) -> PerPEFTError:
    items = ", ".join(map(str, batch.items[1:11])) + (", ..." if len(batch.items) > 11 else "")
    return PerPEFTError(
        f"{what} at {epoch}, step {step}, in a batch of group {batch.group} with items {items}. The state before it is kept. "
        "Look at these items; a smaller --lr, which begins a run of its own, is what helps most often."
    )


def _restore(trainer: Trainer, resume: ResumeState) -> dict[str, Any]:
    """Load what was saved last, if anything, into the trainer; gives the position and the rows to continue with."""
    try:
        state = resume.load()
        if state is None:
            return {"epoch": 1, "step": 0, "loss": 0.0, "seconds": 0.0, "rows": []}
        trainer.load_state_dict(state.pop("trainer"))
        return {name: state[name] for name in ("epoch", "step", "loss", "seconds", "rows")}
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PerPEFTError(f"{resume.path} is no state of this run ({reason}); start over with --restart") from error


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
    processes: Processes,
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
        processes: those that train together; all come here, and the first one saves.
    Returns:
        a row an epoch: stage, epoch, train_loss, seconds, metrics, and skipped_steps, those that fp16 overflowed in.
    Raises:
        PerPEFTError: the loss, the weights or a metric are not finite.
        KeyboardInterrupt: SIGINT or SIGTERM came; the state is saved.
    """
    model, device = trainer.model, trainer.device
    state = _restore(trainer, resume)
    rows, epoch, step = state["rows"], state["epoch"], state["step"]

    def save(**position: Any) -> None:
        present = {**position, "rows": rows, "trainer": trainer.state_dict()}  # in all processes: parts of it are gathered
        processes.first(lambda: resume.save(present))

    while epoch <= epochs:
        begun = time.monotonic() - state["seconds"]
        log = _LossLog(f"{stage} epoch {epoch}", device, state["loss"], step)
        model.train()
        signal_number, encoded = 0, 0
        bar = tqdm(total=sampler.num_batches, initial=step, desc=f"{stage} {epoch}/{epochs}", unit="step", disable=None)
        with bar, stop_requests() as requests:
            while step < sampler.num_batches:
                batch = sampler.batch(epoch, step)
                part = trainer.part(batch)
                loss = trainer.loss(part, source.fetch(part.items[1:], device))
                step += 1
                log.add(step, batch, loss)  # on CPU this stops at a bad loss before the weights take it in
                trainer.update(loss)
                bar.update()
                encoded += len(batch.items) - 1
                if not step % 20 and not bar.disable:
                    rate = encoded / bar.format_dict["elapsed"]
                    bar.set_postfix_str(f"loss {log.mean_so_far():.4f}, {rate:.0f} items/s", refresh=False)
                # looked at once: a request that comes from here on is for the next step
                signal_number = _signal_to_heed(requests, processes, step)
                if signal_number or not step % save_every or step == sampler.num_batches:
                    log.read()  # whatever the device, no state is saved after a bad loss
                    if not trainer.is_finite():
                        raise _not_finite("weights have become infinite or NaN", f"{stage} epoch {epoch}", step, batch)
                    save(epoch=epoch, step=step, loss=log.total, seconds=time.monotonic() - begun)
                if signal_number:
                    break
        if signal_number:  # another process's: one of this process's own has been raised at the end of the block
            raise KeyboardInterrupt(signal_number)
        model.eval()
        metrics = evaluate()
        if not all(np.isfinite(value) for value in metrics.values()):
            raise PerPEFTError(f"the metrics of {stage} epoch {epoch} are not finite; try a smaller --lr")
        skipped = trainer.skipped_steps - sum(row["skipped_steps"] for row in rows)
        row = {"stage": stage, "epoch": epoch, "train_loss": log.total / step, "seconds": time.monotonic() - begun, **metrics}
        row["skipped_steps"] = skipped  # no column of metrics.csv
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
