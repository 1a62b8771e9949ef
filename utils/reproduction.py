"""The runs behind the paper's Tables 2 and 3: which there are, which are done, what is left."""
import contextlib
import io
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import perpeft_iisan
import perpeft_lora_ia3
from utils import reporting
from utils.cli import parse_options
from utils.errors import PerPEFTError
from utils.pipeline import run_name

PEFT_TYPES = ("lora", "ia3", "iisan")
PERPEFT = "PerPEFT"


@dataclass(frozen=True)
class Method:
    """A row of the paper's tables.

    Attributes:
        name: the paper's.
        flags: of the training scripts.
        stage: whose figures count.
        shares_stage_1: whether it starts from PerPEFT's own global model.
        peft_types: the adapters that it is defined for; None where it has none, so that one run serves all.
    """

    name: str
    flags: tuple[str, ...] = ()
    stage: str = "personalized"
    shares_stage_1: bool = False
    peft_types: tuple[str, ...] | None = PEFT_TYPES


WHOLE = Method(PERPEFT)
TABLES: dict[int, tuple[Method, ...]] = {
    2: (
        Method("w/o MM", ("--method", "none"), "global", peft_types=None),
        Method("Frozen MM", ("--method", "frozen"), "global", peft_types=None),
        Method("Global PEFT", ("--method", "global"), "global"),
        WHOLE,
    ),
    3: (
        Method("w/o textual modality", ("--modality", "image")),
        Method("w/o visual modality", ("--modality", "text")),
        Method("w/o group-specific negatives", ("--negatives", "all"), shares_stage_1=True),
        Method("Large Global PEFT", ("--method", "large_global"), "global", peft_types=("lora",)),
        Method("Random grouping", ("--grouping", "random"), shares_stage_1=True),
        WHOLE,
    ),
}
OWN_FLAGS = ("--method", "--modality", "--negatives", "--grouping", "--init_from", "--peft_type", "--trial", "--inference_only")


@dataclass(frozen=True)
class PlannedRun:
    """One training run.

    Attributes:
        peft_type: whose script runs it.
        method: the row that it belongs to.
        trial: the seed.
        arguments: of the script.
        folder: where it is kept.
    """

    peft_type: str
    method: Method
    trial: int
    arguments: tuple[str, ...]
    folder: Path

    @property
    def script(self) -> Callable[[list[str]], None]:
        """The training script's main."""
        return _script(self.peft_type)

    def command(self) -> str:
        """As one types it."""
        name = "perpeft_iisan.py" if self.peft_type == "iisan" else "perpeft_lora_ia3.py"
        return shlex.join(["python3", name, *self.arguments])

    def summary(self) -> dict[str, Any] | None:
        """What the finished run reports; None where it is not finished.

        Raises:
            PerPEFTError: its summary.json is damaged.
        """
        path = self.folder / "summary.json"
        if not path.is_file():
            return None
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            summary[self.method.stage]["test"]
            return summary
        except (KeyError, TypeError, ValueError) as error:
            raise PerPEFTError(f"{path} is damaged ({type(error).__name__}: {error}); remove {self.folder}") from error

    def ranks(self) -> dict[str, Any]:
        """Its users' ranks at the best epoch, as `utils.reporting.read_ranks` gives them."""
        return reporting.read_ranks(self.folder / f"{self.method.stage}_ranks.csv")

    def seconds(self) -> float:
        """What the finished run took."""
        return sum(self.summary()["seconds"].values())


def _script(peft_type: str) -> Callable[[list[str]], None]:
    return perpeft_iisan.main if peft_type == "iisan" else perpeft_lora_ia3.main


def _planned(dataset: str, peft_type: str, method: Method, trial: int, passed_on: list[str]) -> PlannedRun:
    of_script = ("iisan",) if peft_type == "iisan" else ("lora", "ia3")
    arguments = ["--dataset", dataset, *([] if peft_type == "iisan" else ["--peft_type", peft_type])]
    arguments += ["--trial", str(trial), *method.flags, *passed_on]
    if method.shares_stage_1:
        arguments += ["--init_from", str(_planned(dataset, peft_type, WHOLE, trial, passed_on).folder)]
    with contextlib.redirect_stdout(io.StringIO()):  # it tells the learning rate; so will the run
        options = parse_options("", of_script, arguments)
    return PlannedRun(peft_type, method, trial, tuple(arguments), Path(options.output_dir) / run_name(options))


def methods_of(table: int, peft_type: str) -> list[Method]:
    """The rows of a table for one kind of adapter."""
    return [method for method in TABLES[table] if method.peft_types is None or peft_type in method.peft_types]


def plan_runs(dataset: str, tables: list[int], peft_types: list[str], trials: int, passed_on: list[str]) -> list[PlannedRun]:
    """All runs that some tables need, each once; the first trial of every row before any second.

    Args:
        dataset: its name.
        tables: of 2 and 3.
        peft_types: of lora, ia3 and iisan.
        trials: seeds 0 .. trials - 1.
        passed_on: further arguments of the training scripts.
    Raises:
        PerPEFTError: `passed_on` holds what the rows set themselves.
    """
    taken = [flag for flag in OWN_FLAGS if any(given == flag or given.startswith(f"{flag}=") for given in passed_on)]
    if taken:
        raise PerPEFTError(f"{taken[0]} is set by the tables' rows themselves; leave it out (seeds are 0 .. --trials - 1)")
    runs: dict[Path, PlannedRun] = {}
    for trial in range(trials):
        for peft_type in peft_types:
            wanted = [method for table in tables for method in methods_of(table, peft_type)]
            if any(method.shares_stage_1 for method in wanted):
                wanted.insert(0, WHOLE)
            for method in wanted:
                run = _planned(dataset, peft_type if method.peft_types else peft_types[0], method, trial, passed_on)
                runs.setdefault(run.folder, run)
    return list(runs.values())


def estimated_seconds(run: PlannedRun, runs: list[PlannedRun]) -> float | None:
    """What a run will take by the finished ones: the mean of its row's, or else of its adapter's; None without any."""
    finished = [other for other in runs if other.summary()]
    alike = [other for other in finished if (other.peft_type, other.method) == (run.peft_type, run.method)]
    alike = alike or [other for other in finished if other.peft_type == run.peft_type and other.method.peft_types]
    return sum(other.seconds() for other in alike) / len(alike) if alike else None
