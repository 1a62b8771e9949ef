"""Reproduce the paper's Tables 2 and 3 on a data set: run what is missing, then write the tables."""
from pathlib import Path

import perpeft_iisan
import perpeft_lora_ia3
from utils.analysis.reproduction import ADAPTERS, TABLES, format_plan, plan_runs
from utils.analysis.tables import finished_blocks, markdown, write_tables
from utils.common.console import launched_ranks, number, run_main, script_parser
from utils.common.errors import PerPEFTError

MAINS = {"perpeft_lora_ia3.py": perpeft_lora_ia3.main, "perpeft_iisan.py": perpeft_iisan.main}


def main() -> None:
    """Parse, plan, run, write."""
    passed_on_too = "All other options are passed to the training scripts (--device, --lr, --global_epochs, --output_dir, ...)."
    parser = script_parser(__doc__, epilog=passed_on_too)
    parser.add_argument("--dataset", required=True, help="name of the data set")
    parser.add_argument("--tables", type=int, nargs="+", choices=tuple(TABLES), default=list(TABLES), help="which tables")
    parser.add_argument("--peft", nargs="+", choices=ADAPTERS, default=["lora"], help="kinds of adapter")
    parser.add_argument("--trials", type=number(int, 1, 1000), default=5, help="seeds 0 .. trials - 1")
    parser.add_argument("--tables_dir", type=Path, default=Path("./tables"), help="where the tables are written")
    parser.add_argument("--dry_run", action="store_true", help="list the runs and an estimate of their time, run nothing")
    options, passed_on = parser.parse_known_args()
    if launched_ranks() > 1:
        raise PerPEFTError("reproduce_tables runs in one process; start it without a launcher")
    runs = plan_runs(options.dataset, sorted(set(options.tables)), list(dict.fromkeys(options.peft)), options.trials, passed_on)
    print(format_plan(runs), flush=True)
    if options.dry_run:
        return
    for place, run in enumerate(runs, 1):
        print(f"\n[{place}/{len(runs)}] {run.command()}", flush=True)
        done_before = run.summary() is not None
        if not done_before:
            MAINS[run.script](list(run.arguments))
        if not done_before or run is runs[-1]:
            blocks = finished_blocks(options.dataset, options.trials, passed_on)
            write_tables(options.tables_dir, options.dataset, blocks, options.trials)
    print(f"\n{markdown(options.dataset, blocks, options.trials)}\n{options.tables_dir}/{options.dataset}.md, .csv, .tex")


if __name__ == "__main__":
    run_main(main)
