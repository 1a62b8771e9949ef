"""Reproduce the paper's Tables 2 and 3 on a data set: run what is missing, then write the tables."""
import argparse
from pathlib import Path

from utils.cli import HelpFormatter, number, run_main
from utils.errors import PerPEFTError
from utils.processes import launched_size
from utils.reproduction import PEFT_TYPES, TABLES, PlannedRun, estimated_seconds, plan_runs
from utils.tables import blocks_of, markdown, write_tables


def told_plan(runs: list[PlannedRun]) -> str:
    """A line a run, and what is left."""
    lines, total, unknown = [], 0.0, 0
    for run in runs:
        done = run.summary() is not None
        seconds = run.seconds() if done else estimated_seconds(run, runs)
        if not done:
            total, unknown = total + (seconds or 0), unknown + (seconds is None)
        told = "?" if seconds is None else f"{seconds / 60:.1f} min"
        lines.append(f"{'done' if done else 'to do':<6}{told:>10}  {run.command()}")
    left = sum(line.startswith("to do") for line in lines)
    more = f", and {unknown} runs of which nothing alike is finished" if unknown else ""
    return "\n".join([*lines, f"{left} of {len(runs)} runs to do, about {total / 60:.0f} min{more}"])


def main() -> None:
    """Parse, plan, run, write."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        epilog="All other options go to the training scripts as they are (--device, --lr, --global_epochs, --output_dir, ...).",
    )
    parser.add_argument("--dataset", required=True, help="name of the data set")
    parser.add_argument("--tables", type=int, nargs="+", choices=tuple(TABLES), default=list(TABLES), help="which tables")
    parser.add_argument("--peft", nargs="+", choices=PEFT_TYPES, default=["lora"], help="kinds of adapter")
    parser.add_argument("--trials", type=number(int, 1, 1000), default=5, help="seeds 0 .. trials - 1")
    parser.add_argument("--tables_dir", type=Path, default=Path("./tables"), help="where the tables are written")
    parser.add_argument("--dry_run", action="store_true", help="list the runs and an estimate of their time, run nothing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options, passed_on = parser.parse_known_args()
    if launched_size() > 1:
        raise PerPEFTError("the tables are made by one process; start this without a launcher")
    tables, peft_types = sorted(set(options.tables)), list(dict.fromkeys(options.peft))
    runs = plan_runs(options.dataset, tables, peft_types, options.trials, passed_on)
    print(told_plan(runs), flush=True)
    if options.dry_run:
        return
    for place, run in enumerate(runs, 1):
        print(f"\n[{place}/{len(runs)}] {run.command()}", flush=True)
        run.script(list(run.arguments))
        blocks = blocks_of(runs, tables, peft_types, options.dataset)
        write_tables(options.tables_dir, options.dataset, blocks, options.trials)
    print(f"\n{markdown(options.dataset, blocks, options.trials)}\n{options.tables_dir}/{options.dataset}.md, .csv, .tex")


if __name__ == "__main__":
    run_main(main)
