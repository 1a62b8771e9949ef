"""From a command line to a run that can be trained: data, model, ranks, and the locked run folder."""
import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.common.devices import choose_device, choose_precision
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset, require_dataset
from utils.prepare.demo import make_demo
from utils.run import reports
from utils.run.build import build_model, has_groups, image_use, needs_contents
from utils.run.distributed import make_accelerator
from utils.run.folder import RunFolder, run_name, run_settings, with_moved_models
from utils.run.options import parse_options
from utils.run.run import Run
from utils.run.tracking import EpochLog, require_tracker


def train(description: str, peft_types: tuple[str, ...], stages: Callable[[Run], None], arguments: list[str] | None) -> None:
    """What both training scripts do around their stages.

    Args:
        description: for --help.
        peft_types: the script's kinds of adapter.
        stages: calls the stages of a run, in order.
        arguments: of the command line; None for the process's own.
    """
    options = parse_options(description, peft_types=peft_types, arguments=arguments)
    with open_run(options) as run:
        if run is None:  # finished before
            return
        if options.inference_only:
            run.evaluate_saved()
        else:
            stages(run)
            run.report()


@contextlib.contextmanager
def open_run(options: argparse.Namespace) -> Iterator[Run | None]:
    """Read the data, build the model, and open or make the run folder, which is locked meanwhile.

    Args:
        options: as parsed by `utils.run.options`; device and precision are filled in.
    Yields:
        The run; None when the folder holds this run already finished (its table is printed again).
    Raises:
        PerPEFTError: bad data, missing weights, a folder of other settings or one that another process trains in.
    """
    require_tracker(options.log_with)
    if options.dataset == "demo":
        make_demo(options.train_dir)
    require_dataset(options.train_dir, options.dataset)
    folder = RunFolder(Path(options.output_dir) / run_name(options))
    writes = not options.inference_only
    restart = options.restart and writes
    saved = None if restart else folder.saved_settings()
    options.device = choose_device(options.device)
    # A run continues in the precision that it started with.
    options.precision = choose_precision(options.precision or (saved or {}).get("precision"), options.device)
    accelerator = make_accelerator(options.device, options.precision == "fp16", options.log_with, str(folder.path))
    num_groups = options.C if has_groups(options) else 1
    dataset = read_dataset(options.train_dir, options.dataset, needs_contents(options), image_use(options), num_groups)
    settings = with_moved_models(run_settings(options, dataset), saved, options, dataset)
    with contextlib.ExitStack() as stack:
        if writes and accelerator.is_main_process:
            stack.enter_context(folder.lock())
        if not restart:
            folder.check_settings(settings)
        finished, started = folder.is_finished and not restart, folder.has_state and not restart
        accelerator.wait_for_everyone()  # no rank reads the folder from here on, so rank 0 may change it
        if options.inference_only and not finished:
            raise PerPEFTError(f"{folder.path} holds no finished run; train it first, without --inference_only")
        if finished and writes:
            if accelerator.is_main_process:
                folder.remove_state()  # left by a run that was killed right after its summary
                print(f"{folder.path} is finished; --restart trains it again")
                reports.print_results(json.loads((folder.path / "summary.json").read_text(encoding="utf-8")), folder.path)
            yield None
            return
        run = Run(options, dataset, *build_model(options, dataset), folder.path, settings, accelerator)
        if options.init_from and writes and not started:
            run.read_initial_global()
        accelerator.wait_for_everyone()
        if writes and accelerator.is_main_process:  # only now that nothing is missing may a restart discard anything
            folder.begin(settings, restart)
            if options.log_with:
                run.epoch_log = EpochLog(accelerator, options.log_with, folder.path, settings)
        accelerator.wait_for_everyone()
        try:
            yield run
        except BaseException:
            if run.checkpoint and run.checkpoint.saved:
                again = "the same command" + (" without --restart" if options.restart else "")
                print(f"{folder.path} is saved up to {run.checkpoint.saved}; {again} continues from there", file=sys.stderr)
            for tracker in accelerator.trackers:
                tracker.finish()
            raise
        accelerator.end_training()
