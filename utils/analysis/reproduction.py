"""The runs behind the paper's Tables 2 and 3: all of them, the finished ones, an estimate for the rest."""
import argparse
import contextlib
import io
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.peft_configs import PEFT_TYPES
from utils.common.errors import PerPEFTError
from utils.run.folder import fixed_options, read_summary, run_name, settings_of
from utils.run.options import parse_options

PERPEFT = "PerPEFT"
ADAPTERS = ("lora", "ia3", "iisan")


@dataclass(frozen=True)
class Method:
    """A row of the paper's tables."""

    name: str
    flags: tuple[str, ...] = ()  # of the training scripts
    stage: str = "personalized"  # whose metrics count
    shares_stage_1: bool = False  # whether it starts from PerPEFT's own global model
    peft_types: tuple[str, ...] | None = ADAPTERS  # that it is defined for; None where it has no adapter: one run serves all


FULL_METHOD = Method(PERPEFT)
TABLES: dict[int, tuple[Method, ...]] = {
    2: (
        Method("w/o MM", ("--method", "none"), "global", peft_types=None),
        Method("Frozen MM", ("--method", "frozen"), "global", peft_types=None),
        Method("Global PEFT", ("--method", "global"), "global"),
        FULL_METHOD,
    ),
    3: (
        Method("w/o textual modality", ("--modality", "image")),
        Method("w/o visual modality", ("--modality", "text")),
        Method("w/o group-specific negatives", ("--negatives", "all"), shares_stage_1=True),
        Method("Large Global PEFT", ("--method", "large_global"), "global", peft_types=("lora",)),
        Method("Random grouping", ("--grouping", "random"), shares_stage_1=True),
        FULL_METHOD,
    ),
}
OWN_FLAGS = ("--method", "--modality", "--negatives", "--grouping", "--init_from", "--peft_type", "--trial", "--inference_only")


class OtherSettings(PerPEFTError):
    """A folder holds a run with other settings than its name promises."""


@dataclass(frozen=True)
class PlannedRun:
    """One training run."""

    peft_type: str
    method: Method
    trial: int  # the seed
    script: str  # the training script's file
    arguments: tuple[str, ...]
    folder: Path
    options: dict[str, Any] = field(compare=False)  # all that its metrics depend on

    def command(self) -> str:
        """As one types it."""
        return shlex.join(["python3", self.script, *self.arguments])

    def summary(self) -> dict[str, Any] | None:
        """The finished run's summary; None where it is not finished.

        Raises:
            OtherSettings: the folder holds a run with other settings.
            PerPEFTError: its summary.json is damaged.
        """
        path = self.folder / "summary.json"
        if not path.is_file():
            return None
        summary = read_summary(path)
        found = settings_of(summary)
        # None: chosen when a run starts. The folder of the global model that it started from may have been renamed since.
        differences = ", ".join(
            f"{name} {found.get(name)} instead of {value}"
            for name, value in self.options.items()
            if name != "init_from" and value is not None and found.get(name) != value
        )
        if differences:
            raise OtherSettings(f"{self.folder} holds a run with {differences}; use the same options, or another --output_dir")
        return summary


def _arguments_for(peft_type: str, method: Method, arguments: list[str]) -> list[str]:
    """The arguments without those that have no effect with a kind of adapter, or with a method without one."""
    unused = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    if peft_type != "lora" or not method.peft_types:
        unused.add_argument("--rank")
    if peft_type == "iisan" or not method.peft_types:
        unused.add_argument("--precision")
        unused.add_argument("--gradient_checkpointing", action="store_true")
    return unused.parse_known_args(arguments)[1]


def _planned(dataset: str, peft_type: str, method: Method, trial: int, passed_on: list[str]) -> PlannedRun:
    arguments, script, kinds = ["--dataset", dataset], "perpeft_iisan.py", ("iisan",)
    if peft_type != "iisan":
        arguments, script, kinds = [*arguments, "--peft_type", peft_type], "perpeft_lora_ia3.py", PEFT_TYPES
    arguments += ["--trial", str(trial), *method.flags, *_arguments_for(peft_type, method, passed_on)]
    if method.shares_stage_1:
        arguments += ["--init_from", str(_planned(dataset, peft_type, FULL_METHOD, trial, passed_on).folder)]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the learning rate; so will the run
        options = parse_options("", kinds, arguments)
    folder = Path(options.output_dir) / run_name(options)
    return PlannedRun(peft_type, method, trial, script, tuple(arguments), folder, fixed_options(options))


def methods_of(table: int, peft_type: str) -> list[Method]:
    """The rows of a table for one kind of adapter."""
    return [method for method in TABLES[table] if method.peft_types is None or peft_type in method.peft_types]


def plan_runs(dataset: str, tables: list[int], peft_types: list[str], trials: int, passed_on: list[str]) -> list[PlannedRun]:
    """All runs that some tables need, each once; the first trial of every row before any second.

    Args:
        trials: seeds 0 .. trials - 1.
        passed_on: further arguments of the training scripts.
    Raises:
        PerPEFTError: `passed_on` holds what the rows set themselves.
    """
    taken = [flag for flag in OWN_FLAGS if any(given == flag or given.startswith(f"{flag}=") for given in passed_on)]
    if taken:
        raise PerPEFTError(f"{taken[0]} is set by the tables themselves; leave it out (seeds are 0 .. --trials - 1)")
    runs: dict[Path, PlannedRun] = {}
    for trial in range(trials):
        for peft_type in peft_types:
            methods = [method for table in tables for method in methods_of(table, peft_type)]
            if any(method.shares_stage_1 for method in methods):
                methods.insert(0, FULL_METHOD)
            for method in methods:
                run = _planned(dataset, peft_type if method.peft_types else peft_types[0], method, trial, passed_on)
                runs.setdefault(run.folder, run)
    return list(runs.values())


def estimated_seconds(run: PlannedRun, finished: dict[PlannedRun, float]) -> float | None:
    """Mean seconds of finished runs of the same row, or else of the same adapter; None where none is finished."""
    of_adapter = {other: seconds for other, seconds in finished.items() if other.peft_type == run.peft_type}
    alike = [seconds for other, seconds in of_adapter.items() if other.method == run.method]
    if run.method.peft_types:
        alike = alike or [seconds for other, seconds in of_adapter.items() if other.method.peft_types]
    return sum(alike) / len(alike) if alike else None


def format_plan(runs: list[PlannedRun]) -> str:
    """One line a run with its time, taken or estimated, and what is left to do."""
    summaries = {run: run.summary() for run in runs}
    finished = {run: sum(summary["seconds"].values()) for run, summary in summaries.items() if summary}
    estimates = {run: estimated_seconds(run, finished) for run in runs if run not in finished}
    lines = []
    for run in runs:
        seconds = finished[run] if run in finished else estimates[run]
        time = "?" if seconds is None else f"{seconds / 60:.1f} min"
        lines.append(f"{'done' if run in finished else 'to do':<6}{time:>10}  {run.command()}")
    known = [seconds for seconds in estimates.values() if seconds is not None]
    more = f", and {len(estimates) - len(known)} without an estimate" if len(known) < len(estimates) else ""
    return "\n".join([*lines, f"{len(estimates)} of {len(runs)} runs to do, about {sum(known) / 60:.0f} min{more}"])
