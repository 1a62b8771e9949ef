"""From a command line to a run that can be trained: data, model, ranks, and the locked run folder."""
import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from models import MMProjector, NoProjector, PerPEFT, SASRec
from utils.common.devices import check_precision, default_precision, seed_everything
from utils.common.errors import PerPEFTError
from utils.data.dataset import Dataset, read_dataset, require_dataset
from utils.items.source import ItemSource
from utils.prepare.demo import make_demo
from utils.run import reports
from utils.run.build import EncoderKind, build_encoder, foundation_name, image_use, needs_contents
from utils.run.distributed import choose_launched_device, make_accelerator
from utils.run.fingerprint import fingerprints
from utils.run.folder import RunFolder
from utils.run.options import parse_options
from utils.run.run import Run
from utils.run.settings import fixed_options, minimum_users, run_name
from utils.run.tracking import require_tracker


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
    options.device = choose_launched_device(options.device)
    folder = RunFolder(Path(options.output_dir) / run_name(options))
    writes = not options.inference_only
    restart = options.restart and writes
    if options.precision is None:  # a run continues in the precision that it started with
        saved = None if restart else folder.saved_settings()
        options.precision = (saved or {}).get("precision") or default_precision(options.device)
    check_precision(options.precision, options.device)
    accelerator = make_accelerator(options.device, options.precision == "fp16", options.log_with, str(folder.path))
    options.device = str(accelerator.device) if accelerator.num_processes > 1 else options.device
    contents = needs_contents(options)
    dataset = read_dataset(options.train_dir, options.dataset, contents, image_use(options), minimum_users(options))
    # Through JSON, since it will be compared with the content of a file.
    settings = json.loads(json.dumps({**fixed_options(options), **fingerprints(options, dataset)}))
    with contextlib.ExitStack() as stack:
        if writes and accelerator.is_main_process:
            stack.enter_context(folder.locked())
        if not restart:
            folder.check_settings(settings)
        finished, started = folder.is_finished and not restart, folder.has_state and not restart
        accelerator.wait_for_everyone()  # every rank has looked before rank 0 changes anything
        if options.inference_only and not finished:
            raise PerPEFTError(f"{folder.path} holds no finished run; train it first, without --inference_only")
        if finished and writes:
            if accelerator.is_main_process:
                folder.print_finished()
            yield None
            return
        run = Run(options, dataset, *build_model(options, dataset), folder.path, settings, accelerator)
        if options.init_from and writes and not started:
            run.read_initial_global()
        accelerator.wait_for_everyone()
        if writes and accelerator.is_main_process:  # only now that nothing is missing may a restart discard anything
            folder.begin(settings, restart)
            run.open_log()
        accelerator.wait_for_everyone()
        try:
            yield run
        except BaseException:
            if run.saved:
                again = "the same command" + (" without --restart" if options.restart else "")
                print(f"{folder.path} is saved up to {run.saved}; {again} continues from there", file=sys.stderr)
            run.close_log()
            raise
        accelerator.end_training()


def build_model(options: argparse.Namespace, dataset: Dataset) -> tuple[PerPEFT, ItemSource]:
    """The model with one group, on its device, and the source of its item inputs."""
    device = torch.device(options.device)
    seed_everything(options.trial)
    encoder, source = build_encoder(EncoderKind.of(options), dataset, foundation_name(options), device, image_use(options))
    projector = (MMProjector if encoder.feature_dim else NoProjector)(encoder.feature_dim, options.hidden_units)
    sasrec = SASRec(
        dataset.num_items,
        options.hidden_units,
        options.maxlen,
        options.num_blocks,
        options.num_heads,
        options.dropout_rate,
        options.weight_scalar,
    )
    model = PerPEFT(encoder, projector, sasrec).to(device)
    source.place_on(device)
    print(
        f"{options.dataset}: {dataset.num_users} users, {dataset.num_items} items, {len(dataset.histories.items)} interactions; "
        f"{reports.describe_adapter(options.peft_type, encoder)}; on {device}",
        flush=True,
    )
    return model, source
