"""Options of the training scripts, and the way every script of this project ends."""
import argparse
import math
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from utils.errors import PerPEFTError
from utils.foundation import DEFAULT_CLIP
from utils.hyperparameters import DEMO, FALLBACK, read_hyperparameters


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A checked option type: a number of `kind` in [low, high], or in (low, high] with `above`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is no {'whole ' if kind is int else ''}number") from None
        if not (low < value if above else low <= value) or not value <= high or not math.isfinite(value):
            upper = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {'above' if above else 'at least'} {low:g}{upper}")
        return value

    return parse


def build_parser(description: str, peft_types: tuple[str, ...]) -> argparse.ArgumentParser:
    """The options of a training script for some kinds of adapter; those that only one kind needs are left out for others."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    count, positive = number(int, 1), number(float, 0, above=True)
    weight, probability = number(float, 0), number(float, 0, 0.99)

    run = parser.add_argument_group("run")
    run.add_argument("--dataset", required=True, help="name of the data set; 'demo' makes its own")
    run.add_argument("--train_dir", default="./dataset", help="folder of the data sets")
    run.add_argument("--output_dir", default="./runs", help="where the run folder is made")
    run.add_argument("--device", default=None, help="cuda:N, cpu or mps (default: cuda:0 where there is one, else cpu)")
    run.add_argument("--trial", type=number(int, 0, 2**31), default=0, help="the seed")
    run.add_argument("--restart", action="store_true", help="start over instead of continuing")
    run.add_argument("--inference_only", action="store_true", help="evaluate a finished run's saved weights")
    run.add_argument("--save_every", type=count, default=500, help="steps between saves of the state to continue from")
    run.add_argument("--debug", action="store_true", help="show tracebacks")

    training = parser.add_argument_group("training")
    training.add_argument("--lr", type=positive, default=None, help="learning rate (default: perpeft_hyperparameter.pickle's)")
    training.add_argument("--wdecay", type=weight, default=None, help="weight decay (default: perpeft_hyperparameter.pickle's)")
    training.add_argument("--batch_size", type=count, default=16, help="users a batch")
    training.add_argument("--global_epochs", type=count, default=10, help="epochs of stage 1, global PEFT")
    training.add_argument("--num_epochs", type=count, default=20, help="epochs of stage 3, personalized PEFT")
    training.add_argument("--l2_emb", type=weight, default=1e-6, help="weight of the L2 norm of the item embeddings")

    recommender = parser.add_argument_group("recommender")
    recommender.add_argument("--maxlen", type=count, default=10, help="longest history that is read")
    recommender.add_argument("--hidden_units", type=count, default=32, help="width")
    recommender.add_argument("--num_blocks", type=count, default=2, help="attention blocks")
    recommender.add_argument("--num_heads", type=count, default=4, help="attention heads a block")
    recommender.add_argument("--dropout_rate", type=probability, default=0.3, help="dropout")
    recommender.add_argument("--weight_scalar", type=weight, default=0.5, help="weight of the multimodal item vector")

    adapters = parser.add_argument_group("foundation model and adapters")
    if len(peft_types) > 1:
        adapters.add_argument("--peft_type", choices=peft_types, default=peft_types[0], help="kind of adapter")
    adapters.add_argument("--clip_model", default=None, help=f"CLIPModel folder or hub name (default: {DEFAULT_CLIP})")
    if "lora" in peft_types:
        adapters.add_argument("--rank", type=count, default=4, help="LoRA's rank")
    else:
        parser.set_defaults(rank=None)
    adapters.add_argument("--C", type=count, default=None, help="user groups (default: 8; demo: 4)")
    adapters.add_argument("--missing_images", choices=("error", "blank"), default="error", help="what to do without a picture")
    if len(peft_types) == 1:
        parser.set_defaults(peft_type=peft_types[0])
    return parser


def parse_options(description: str, peft_types: tuple[str, ...], arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse a training script's command line and fill in what depends on the data set.

    Learning rate and weight decay come from perpeft_hyperparameter.pickle where they are not given, and 1e-4 where it has
    no entry. `--dataset demo` is made on first use and brings its own CLIP.
    """
    parser = build_parser(description, peft_types)
    options = parser.parse_args(arguments)
    if options.hidden_units % options.num_heads:
        parser.error(f"--num_heads {options.num_heads} must divide --hidden_units {options.hidden_units}")
    if Path(options.dataset).name != options.dataset or options.dataset in (".", ".."):
        parser.error(f"--dataset {options.dataset}: a name is wanted, not a path; its folder goes into --train_dir")
    is_demo = options.dataset == "demo"
    known = DEMO if is_demo else read_hyperparameters(options.dataset, options.peft_type)
    source = "the demo's" if is_demo else "perpeft_hyperparameter.pickle" if known else "default"
    origins = []
    for name, value in (known or FALLBACK).items():
        given = getattr(options, name) is not None
        if not given:
            setattr(options, name, value)
        origins.append(f"{name} {getattr(options, name):g} ({'given' if given else source})")
    print(", ".join(origins), flush=True)
    options.C = options.C or (4 if is_demo else 8)
    options.clip_model = options.clip_model or ("demo" if is_demo else DEFAULT_CLIP)
    return options


def _raise_interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main` and end the process: a user's mistake in one sentence with code 2, never a traceback."""
    signal.signal(signal.SIGTERM, _raise_interrupt)
    debug = "--debug" in sys.argv
    try:
        main()
    except PerPEFTError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        if debug:
            traceback.print_exc()
        print(
            f"error: the device's memory is full ({str(error).splitlines()[0]}). What was saved before is kept; try a smaller "
            "--batch_size, then start the same command again.",
            file=sys.stderr,
        )
        sys.exit(1)
    except OSError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}. What was saved before is kept; start the same command again to continue.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted: what was trained is saved; the same command continues from there", file=sys.stderr)
        sys.exit(130)
