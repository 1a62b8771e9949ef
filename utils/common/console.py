"""The command line: checked option types, and how every script of this project ends."""
import argparse
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from utils.common.errors import PerPEFTError, first_line, is_out_of_memory

# How long another rank keeps its error to itself: rank 0 meets most errors too and reports them, and the launcher then ends all.
ERROR_GRACE_SECONDS = 60


def number(kind: type, low: float, high: float = 1_000_000, *, above: bool = False) -> Callable[[str], float]:
    """A checked option type: a number of `kind` in [low, high], or in (low, high] with `above`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text[:40]}' is not a {'whole ' if kind is int else ''}number") from None
        if not (low < value if above else low <= value) or not value <= high:  # so written, NaN is refused too
            lowest = f"above {low:g}" if above else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text[:40]} must be {lowest} and at most {high:g}")
        return value

    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a default where there is one and the help text does not state it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        stated = action.default is None or action.default is False or "default" in (action.help or "")
        return action.help if stated else super()._get_help_string(action)


SHARED_OPTIONS = {  # of several scripts
    "--dataset": {"required": True, "help": "name of the data set; 'demo' makes its own"},
    "--train_dir": {"default": "./dataset", "help": "folder of the data sets"},
    "--C": {"type": number(int, 1), "default": None, "help": "user groups (default: 8; demo: 4)"},
    "--device": {"default": None, "help": "cuda:N, cpu or mps (default: cuda:0 where there is one, else cpu)"},
    "--missing_images": {"choices": ("error", "blank"), "default": "error", "help": "what to do without an image"},
    "--debug": {"action": "store_true", "help": "show tracebacks"},
}


def script_parser(description: str, *shared: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A script's parser, with --debug and those of SHARED_OPTIONS that it names; options cannot be abbreviated."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False, epilog=epilog)
    for name in (*shared, "--debug"):
        parser.add_argument(name, **SHARED_OPTIONS[name])
    return parser


def launched_ranks() -> int:
    """How many ranks a launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(number)


def describe_error(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the sentence that a script ends with; None for what needs a traceback."""
    if isinstance(error, SystemExit):
        return 2, "error: wrong options"
    if isinstance(error, KeyboardInterrupt):
        number = error.args[0] if error.args else signal.SIGINT
        return 128 + number, f"\ninterrupted by {signal.Signals(number).name}"
    if isinstance(error, PerPEFTError):
        return 2, f"error: {error}"
    if is_out_of_memory(error):
        return 1, f"error: the memory is full ({first_line(error)})"
    if isinstance(error, OSError) and error.errno is not None:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = ". Free some space on that disk"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            hint = ". Allow access to it, or choose another folder (--output_dir, --train_dir)"
        return 1, f"error: {error}{hint}"
    return None


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; it ends with one sentence at an error of the user or the machine, with a traceback at any other.

    Exit codes: 2 for an error that the user can correct, 1 for trouble of the machine, 130 and 143 after SIGINT and SIGTERM.
    `--debug` shows the traceback of every error. Of several ranks, rank 0 alone writes to the terminal; another rank's error is
    shown only if rank 0 has not ended meanwhile.
    """
    stderr, alone = sys.stderr, launched_ranks() == 1
    rank = 0 if alone else int(os.environ.get("RANK", "0"))
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        main()
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        known = describe_error(error)
        if not rank and (isinstance(error, SystemExit) or (known is None and alone)):
            raise  # argparse has reported it, or Python will
        code, sentence = known or (1, "".join(traceback.format_exception(error)).rstrip())
        # The launcher may send SIGTERM now that one rank ends: rank 0 reports first, another rank ends at once.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if rank else signal.SIG_IGN)
        if not rank:
            if "--debug" in sys.argv and known is not None:
                traceback.print_exc()
            print(sentence, file=stderr)
        elif not isinstance(error, KeyboardInterrupt):
            time.sleep(ERROR_GRACE_SECONDS)
            print(f"rank {rank}: {sentence}", file=stderr, flush=True)
        if alone:
            sys.exit(code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # at once, since the teardown of one of several may wait for the others or abort
