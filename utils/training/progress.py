"""How far a stage has come: its epoch and step, the running epoch's losses, and a row for every finished epoch."""
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from utils.common.errors import PerPEFTError
from utils.training.sampling import Batch

# Steps between two reads of losses, and of other processes' signals. On a GPU the host waits for each read, so they are rare.
READ_INTERVALS = {"cpu": 1, "cuda": 50, "mps": 50}


def best_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the best epoch by valid NDCG@20; the earlier of equals."""
    return max(rows, key=lambda row: row["valid_NDCG@20"])


class Progress:
    """The position and the history of one stage of so many epochs and steps an epoch; each rank has the loss of its own shard.

    Attributes:
        rows: one for each finished epoch: stage, epoch, train_loss, seconds, metrics, skipped_steps.
        epoch, step: the running epoch (from 1) and its finished steps.
        interval: how many steps may pass before losses, or other ranks' signals, are read.
    """

    def __init__(self, stage: str, epochs: int, steps: int, device: torch.device, accelerator: Accelerator):
        self._accelerator = accelerator
        self.stage, self.epochs, self.steps = stage, epochs, steps
        self.interval = READ_INTERVALS[device.type]
        self.rows: list[dict[str, Any]] = []
        self.epoch, self.step, self._loss, self._seconds = 1, 0, 0.0, 0.0
        self._unread: list[tuple[int, Batch, torch.Tensor]] = []
        self._last_batch: Batch | None = None

    def __str__(self) -> str:
        return f"{self.stage} epoch {self.epoch}, step {self.step}"

    def remaining(self) -> Iterator[int]:
        """The epochs that are left, each with its progress bar."""
        while self.epoch <= self.epochs:
            self._started, self._encoded = time.monotonic() - self._seconds, 0
            description = f"{self.stage} {self.epoch}/{self.epochs}"
            with tqdm(total=self.steps, initial=self.step, desc=description, unit="step", disable=None) as self._bar:
                yield self.epoch

    def add(self, step: int, batch: Batch, loss: torch.Tensor) -> None:
        """Note a finished step (from 1); its loss is read later, as `read_losses` says, so that the host rarely waits."""
        self.step, self._last_batch, self._seconds = step, batch, time.monotonic() - self._started
        self._unread.append((step, batch, loss))
        if len(self._unread) >= self.interval:
            self.read_losses()
        self._encoded += len(batch.items) - 1
        if not self._bar.disable and not step % 20:
            rate = self._encoded / self._bar.format_dict["elapsed"]
            self._bar.set_postfix_str(f"loss {self.mean_loss:.4f}, {rate:.0f} items/s", refresh=False)
        self._bar.update()

    @property
    def mean_loss(self) -> float:
        """Mean of the epoch's losses read so far; NaN before the first."""
        num_read = self.step - len(self._unread)
        return self._loss / num_read if num_read else math.nan

    def read_losses(self) -> None:
        """Read the losses still on the device; if one is not finite, raises a PerPEFTError that names step, group and items."""
        if not self._unread:
            return
        losses = torch.stack([loss for _, _, loss in self._unread])  # [steps]
        losses = self._accelerator.reduce(losses, "mean").cpu().double().numpy()
        for (step, batch, _), loss in zip(self._unread, losses):
            if not np.isfinite(loss):
                raise self.not_finite(f"the loss is {loss}", step, batch)
        self._loss += float(losses.sum())
        self._unread = []

    def not_finite(self, what: str, step: int | None = None, batch: Batch | None = None) -> PerPEFTError:
        """The error for numbers that became infinite or NaN in a step, by default the last one."""
        step, batch = step or self.step, batch or self._last_batch
        where = f"at {self.stage} epoch {self.epoch}, step {step}"
        if batch is not None:
            items = ", ".join(map(str, batch.items[1:11])) + (", ..." if len(batch.items) > 11 else "")
            where += f", in a batch of group {batch.group} with items {items}"
        return PerPEFTError(
            f"{what} {where}. The state before it is kept. Check these items; a smaller --lr, which starts a run of its own, "
            "helps most often."
        )

    def end_epoch(self, metrics: dict[str, float], skipped_steps: int) -> bool:
        """Finish the running epoch; returns whether it is the best so far. `skipped_steps` counts from the stage's beginning."""
        seconds = time.monotonic() - self._started
        row = {"stage": self.stage, "epoch": self.epoch, "train_loss": self._loss / self.steps, "seconds": seconds, **metrics}
        row["skipped_steps"] = skipped_steps - sum(earlier["skipped_steps"] for earlier in self.rows)
        self.rows.append(row)
        self.epoch, self.step, self._loss, self._seconds = self.epoch + 1, 0, 0.0, 0.0
        return best_row(self.rows) is row

    def state_dict(self) -> dict[str, Any]:
        """Plain values to continue from."""
        return {"epoch": self.epoch, "step": self.step, "loss": self._loss, "seconds": self._seconds, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.epoch, self.step, self.rows = state["epoch"], state["step"], state["rows"]
        self._loss, self._seconds = state["loss"], state["seconds"]
