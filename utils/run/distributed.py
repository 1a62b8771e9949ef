"""Several ranks through Hugging Face accelerate: the Accelerator of a run, and a stop signal that all ranks obey together."""
import signal
from datetime import timedelta
from types import TracebackType

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs


def make_accelerator(device: str, scaled: bool = False, log_with: str | None = None, folder: str | None = None) -> Accelerator:
    """The Accelerator of one run.

    Args:
        device: "cpu", "cuda:N" or "mps".
        scaled: whether gradients are scaled against fp16 overflow; the encoder applies autocast itself.
        log_with, folder: tracker, and the folder for its files.
    """
    handlers = [
        AutocastKwargs(enabled=False),
        DistributedDataParallelKwargs(broadcast_buffers=False),
        # Rank 0 may compute hidden states for hours before it reaches the point where the others wait.
        InitProcessGroupKwargs(timeout=timedelta(days=7)),
    ]
    AcceleratorState._reset_state()  # of a run before in this process, whose precision accelerate would insist on
    return Accelerator(
        cpu=device == "cpu", mixed_precision="fp16" if scaled else "no", kwargs_handlers=handlers, log_with=log_with,
        project_dir=folder,
    )  # fmt: skip


class StopSignal:
    """Collects SIGINT and SIGTERM while a block runs, so that a step ends and its state is saved; a second one stops at once.

    Args:
        accelerator: the ranks, all of which stop after the same step when one gets a signal.
        interval: steps between exchanges of several ranks.
    """

    def __init__(self, accelerator: Accelerator, interval: int):
        self._accelerator, self._interval = accelerator, interval
        self._number = 0

    def __enter__(self) -> "StopSignal":
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._number and error is None:  # it came after the last step was checked
            raise KeyboardInterrupt(self._number)

    def _receive(self, number: int, _frame: object) -> None:
        if self._number:
            raise KeyboardInterrupt(number)
        self._number = number

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; of several ranks, all get the same answer."""
        if self._accelerator.num_processes == 1:
            return bool(self._number)
        if step % self._interval:  # the ranks exchange it at intervals
            return False
        if self._number:
            self._accelerator.set_trigger()
        return self._accelerator.check_trigger()

    @property
    def number(self) -> int:
        """The signal's number; SIGTERM's where another rank got it."""
        return self._number or signal.SIGTERM
