"""From a command line to a run that can be trained: data, model, ranks, and the locked run folder."""
import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from utils.common.devices import choose_device
from utils.common.errors import PerPEFTError, is_out_of_memory
from utils.data.dataset import read_dataset, require_dataset
from utils.prepare.demo import make_demo
from utils.run import reports
from utils.run.build import build_model, has_groups, image_use, needs_contents
from utils.run.distributed import make_accelerator
from utils.run.folder import RunFolder, read_summary, run_name, run_settings, with_moved_models
from utils.run.options import parse_options
from utils.run.run import Run
from utils.run.tracking import EpochLog, require_tracker
from utils.training.foreign_weights import load_foreign_global


def train(description: str, peft_types: tuple[str, ...], stages: Callable[[Run], None], arguments: list[str] | None) -> None:
    """Run a training script that offers some kinds of adapter: open or continue the run and train its `stages`."""
    options = parse_options(description, peft_types, arguments)
    with open_run(options) as run:
        if run and options.inference_only:
            run.evaluate_saved()
        elif run:
            stages(run)
            run.report()


@contextlib.contextmanager
def open_run(options: argparse.Namespace) -> Iterator[Run | None]:
    """Read the data, build the model, and open or make the run folder, which is locked meanwhile.

    Yields the run; None when the folder holds it already finished (its table is printed again). Device and precision are filled
    in. Raises a PerPEFTError for bad data, missing weights, a folder of other settings or one that another process trains in.
    """
    if options.log_with:
        require_tracker(options.log_with)
    if options.dataset == "demo":
        make_demo(options.train_dir)
    require_dataset(options.train_dir, options.dataset)
    folder = RunFolder(Path(options.output_dir) / run_name(options))
    writes = not options.inference_only
    restart = options.restart and writes
    saved = None if restart else folder.saved_settings()
    options.device = choose_device(options.device)
    trained_in = _settle_precision(options, saved, folder.is_finished)
    accelerator = make_accelerator(options.device, options.precision == "fp16", options.log_with, str(folder.path))
    num_groups = options.C if has_groups(options) else 1
    dataset = read_dataset(options.train_dir, options.dataset, needs_contents(options), image_use(options), num_groups)
    settings = with_moved_models({**run_settings(options, dataset), "precision": trained_in}, saved, options, dataset)
    with folder.lock() if writes and accelerator.is_main_process else contextlib.nullcontext():
        if not restart:
            folder.check_settings(settings)
        finished = folder.is_finished and not restart
        started = folder.has_state and not restart
        accelerator.wait_for_everyone()  # no rank reads the folder from here on, so rank 0 may change it
        if options.inference_only and not finished:
            raise PerPEFTError(f"{folder.path} holds no finished run; train it first, without --inference_only")
        if finished and writes:
            if accelerator.is_main_process:
                folder.remove_state()  # left by a run that was killed right after its summary
                print(f"{folder.path} is finished; --restart trains it again")
                reports.print_results(read_summary(folder.path / "summary.json"), folder.path)
            yield None
            return
        run = Run(options, dataset, *build_model(options, dataset), folder.path, settings, accelerator)
        if options.init_from and writes and not started:
            load_foreign_global(run.model, Path(options.init_from), folder.path, options.peft_type, options.dataset)
        accelerator.wait_for_everyone()  # only now that no rank misses anything may a restart discard what is there
        if writes and accelerator.is_main_process:
            folder.begin(settings, started)
            if options.log_with:
                run.epoch_log = EpochLog(accelerator, options.log_with, folder.path, settings)
        accelerator.wait_for_everyone()
        try:
            yield run
        except BaseException as error:
            _say_how_to_go_on(run, error)
            for tracker in accelerator.trackers:
                tracker.finish()
            raise
        accelerator.end_training()


def _settle_precision(options: argparse.Namespace, saved: dict[str, Any] | None, finished: bool) -> str:
    """Fill in the precision to compute in, and return the run's own: by default that which it started with.

    They differ where a run that was trained in fp16 on CUDA is evaluated elsewhere. Raises a PerPEFTError for fp16 without CUDA,
    where gradients cannot be scaled.
    """
    asked, before = options.precision, (saved or {}).get("precision")
    on_cuda = options.device.startswith("cuda")
    own = options.precision = asked or before or ("fp16" if on_cuda else "fp32")
    if own == "fp16" and not on_cuda:
        if asked:
            raise PerPEFTError(f"--precision fp16 needs a CUDA device, not {options.device}; use --precision bf16 or fp32")
        if not finished:
            raise PerPEFTError(f"this run was started in fp16 on CUDA, not {options.device}; continue it there, or use --restart")
        options.precision = "fp32"
    return own


def _say_how_to_go_on(run: Run, error: BaseException) -> None:
    """Print how far a run is saved that an error or a signal has ended, and what the same command would do."""
    full = is_out_of_memory(error)
    if run.checkpoint and run.checkpoint.saved:
        way_on = f"; the same command{' without --restart' if run.options.restart else ''} continues from there"
        comes_again = not (full or isinstance(error, (KeyboardInterrupt, OSError)))  # such as a loss that is not finite
        print(f"{run.folder} is saved up to {run.checkpoint.saved}{'' if comes_again else way_on}", file=sys.stderr)
    if full:
        print(
            "Less memory is needed with --gradient_checkpointing (LoRA and the like), with which a run continues, or with a "
            "smaller --batch_size, which starts a new run and so needs --restart or another --output_dir",
            file=sys.stderr,
        )
