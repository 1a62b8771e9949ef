"""Several ranks through Hugging Face accelerate: the Accelerator of a run, and stop signals that all ranks obey together."""
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs


def make_accelerator(device: str, scaled: bool = False, log_with: str | None = None, folder: str | None = None) -> Accelerator:
    """The Accelerator of one run on "cpu", "cuda:N" or "mps"; the files of the tracker `log_with` go into `folder`.

    Gradients can be scaled against fp16 overflow; the encoder applies autocast itself.
    """
    handlers = [
        AutocastKwargs(enabled=False),
        DistributedDataParallelKwargs(broadcast_buffers=False),
        # Rank 0 may compute hidden states for hours before it reaches the point where the others wait.
        InitProcessGroupKwargs(timeout=timedelta(days=7)),
    ]
    AcceleratorState._reset_state()  # of a run before in this process, whose precision accelerate would insist on
    precision, on_cpu = "fp16" if scaled else "no", device == "cpu"
    return Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=handlers, log_with=log_with, project_dir=folder)


@contextlib.contextmanager
def stop_signals(accelerator: Accelerator, interval: int) -> Iterator[Callable[[int], int | None]]:
    """Collect SIGINT and SIGTERM while a block runs, so that a step ends and its state is saved; a second one stops at once.

    What a handler raises inside a destructor would be lost. A signal that no step has obeyed is raised at the end of the block.
    Yields a function of a step's number: the signal to stop for after this step, None to go on. Several ranks, which exchange
    signals at multiples of `interval`, all stop after the same one.
    """
    received: list[int] = []

    def receive(number: int, _frame: object) -> None:
        if received:
            raise KeyboardInterrupt(number)
        received.append(number)
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, b"\nstopping after this step or evaluation; a second signal stops at once\n")

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
    if number := requested(0):
        raise KeyboardInterrupt(number)
