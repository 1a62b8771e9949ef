"""Several ranks through Hugging Face accelerate: the Accelerator of a run, and stop signals that all ranks obey together."""
import contextlib
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs


def make_accelerator(device: str, scaled: bool = False, log_with: str | None = None, folder: str | None = None) -> Accelerator:
    """The Accelerator of one run.

    Args:
        device: "cpu", "cuda:N" or "mps".
        scaled: whether gradients are scaled against fp16 overflow; the encoder applies autocast itself.
        log_with, folder: a tracker, and where its files go.
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


@contextlib.contextmanager
def stop_signals(accelerator: Accelerator, interval: int) -> Iterator[Callable[[int], int | None]]:
    """Collect SIGINT and SIGTERM while a block runs, so that a step ends and its state is saved; a second one stops at once.

    Args:
        accelerator: the ranks, all of which stop after the same step when one gets a signal.
        interval: steps between exchanges of several ranks.
    Yields:
        a function of a step's number: the signal to stop for after this step, None to go on; of several ranks, all stop or none
    """
    received: list[int] = []

    def receive(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt(number)
        received.append(number)

    def requested(step: int) -> int | None:
        own = received[0] if received else None
        if accelerator.num_processes == 1:
            return own
        if step % interval:
            return None
        if own:
            accelerator.set_trigger()
        return (own or signal.SIGTERM) if accelerator.check_trigger() else None

    handlers = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:  # after the last step was checked
        raise KeyboardInterrupt(received[0])
