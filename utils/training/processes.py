"""Several processes that train one model together; alone, without a launcher, all this does nothing and costs nothing."""
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NoReturn, TextIO

import torch

from utils.common.devices import choose_device, is_out_of_memory
from utils.common.errors import PerPEFTError

PATIENCE = 60  # seconds that a process leaves the first one to tell a mistake that both have met


class OtherProcessEnded(PerPEFTError):
    """Another process of the run is gone, or has met an error, and has said why; this one cannot go on without it."""


class Processes:
    """One process alone, and the interface of several.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        device: where this one computes.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1):
        self.device = device
        self.rank = rank
        self.size = size

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and tells."""
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a tensor on this process's device by its sum over all processes."""
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        return [value]

    def first(self, work: Callable[[], Any]) -> Any:
        """What `work` gives in the first process; the others wait for it and get the same.

        Raises:
            OtherProcessEnded: here, where the first process met an error, which that one raises.
        """
        return work()

    def wait(self) -> None:
        """Until all processes are here."""

    def signal_of_any(self, number: int) -> int:
        """A signal that any process was sent, given this one's; 0 where there is none."""
        return number


class ManyProcesses(Processes):
    """One of several processes that accelerate has connected."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a tensor on this process's device by its sum over all processes; the same bits in each."""
        with _telling_of_lost_processes():
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        values = [None] * self.size
        with _telling_of_lost_processes():
            torch.distributed.all_gather_object(values, value)
        return values

    def first(self, work: Callable[[], Any]) -> Any:
        """What `work` gives in the first process; the others wait for it and get the same."""
        if not self.is_first:
            ended_well, result = self._from_first(None)
            if not ended_well:
                raise OtherProcessEnded("the first process has met an error")
            return result
        try:
            result = work()
        except Exception:
            with contextlib.suppress(OtherProcessEnded):
                self._from_first((False, None))
            raise
        return self._from_first((True, result))[1]

    def _from_first(self, value: Any) -> Any:
        values = [value]
        with _telling_of_lost_processes():
            torch.distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def wait(self) -> None:
        """Until all processes are here."""
        self.sum_(torch.zeros((), device=self.device)).item()

    def signal_of_any(self, number: int) -> int:
        """A signal that any process was sent, given this one's; 0 where there is none."""
        numbers = torch.tensor(number, device=self.device)
        with _telling_of_lost_processes():
            torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        return int(numbers)


@contextlib.contextmanager
def _telling_of_lost_processes() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise OtherProcessEnded(f"another process of this run has ended; what it said tells why ({reason})") from error


def launched_rank() -> int:
    """This process's number among those that a launcher has started; 0 without one."""
    return int(os.environ.get("RANK", "0")) if launched_size() > 1 else 0


def launched_size() -> int:
    """How many processes a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_process(code: int) -> NoReturn:
    """End this process at an error: one that is connected to others at once, since its teardown may wait for them or abort."""
    if launched_size() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def silence_others() -> TextIO:
    """Let nothing that is printed in other processes than the first be seen; gives where an error of their own is told."""
    told = sys.stderr
    if launched_rank():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    return told


def _choose_launched_device(name: str | None) -> str:
    """cpu, or cuda where every process takes the GPU of its own number."""
    if name not in (None, "cpu", "cuda", "cuda:0"):
        raise PerPEFTError(f"--device {name}: with several processes each takes a GPU of its own; leave --device out or say cpu")
    device = choose_device(name).split(":")[0]
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device == "cuda" and processes_here > torch.cuda.device_count():
        raise PerPEFTError(
            f"{processes_here} processes were started on {torch.cuda.device_count()} GPUs; start as many, or add --device cpu"
        )
    return device


@contextlib.contextmanager
def joined_processes(device: str | None) -> Iterator[Processes]:
    """This process among those that `accelerate launch` or `torch.distributed.run` has started; alone without a launcher.

    Args:
        device: as on the command line.
    Raises:
        PerPEFTError: no such device, or fewer GPUs than processes.
    """
    if launched_size() == 1:
        yield Processes(torch.device(choose_device(device)))
        return
    kind = _choose_launched_device(device)
    from accelerate import PartialState  # only here: it takes time to import

    # The first process may be at work for hours, on hidden states say, before it comes to where the others wait.
    state = PartialState(cpu=kind == "cpu", timeout=timedelta(days=7))
    own = torch.device("cpu") if kind == "cpu" else state.device
    processes = ManyProcesses(own, state.process_index, state.num_processes)
    yield processes
    processes.wait()
    torch.distributed.destroy_process_group()  # only after a good end: at an error the others may wait in it for ever
