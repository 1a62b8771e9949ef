"""Options of the training scripts, and of those that open a finished run."""
import argparse
import json
from pathlib import Path
from typing import Any

from models.item_encoder import MODALITIES
from models.pair import TEXT_POOLINGS
from models.peft_configs import ORIGIN, PAPER_RANK, peft_config
from utils.common.console import SHARED_OPTIONS, HelpFormatter, number
from utils.common.devices import PRECISIONS
from utils.data.dataset import default_groups
from utils.items.model_files import DEFAULT_CLIP
from utils.run.hyperparameters import default_hyperparameters
from utils.run.tracking import TRACKERS

METHODS = ("perpeft", "global", "large_global", "frozen", "none")
COUNT, BLOCKS, SEED = number(int, 1), number(int, 1, 1000), number(int, 0, 2**31)
SIZE = number(int, 1, 10_000)  # of layers and tables: what is beyond would not fit into any memory
RATE, WEIGHT, SHARE = number(float, 0, 10, above=True), number(float, 0, 1000), number(float, 0, 0.99)


def _peft_type(name: str) -> str:
    try:
        peft_config(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def _peft_settings(path: str) -> dict[str, Any]:
    """A configuration of peft, as in its adapter_config.json."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("peft_type"), str):
        raise argparse.ArgumentTypeError(f'{path} names no adapter; expected an object with "peft_type", such as "LORA"')
    return content


def build_parser(description: str, peft_types: tuple[str, ...]) -> argparse.ArgumentParser:
    """The options of a training script for some kinds of adapter; those that only one kind needs are left out for others."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("run").add_argument
    add("--dataset", **SHARED_OPTIONS["--dataset"])
    add("--train_dir", **SHARED_OPTIONS["--train_dir"])
    add("--output_dir", default="./runs", help="where the run folder is made")
    add("--device", **SHARED_OPTIONS["--device"])
    add("--trial", type=SEED, default=0, help="the seed")
    add("--restart", action="store_true", help="start over instead of continuing")
    add("--inference_only", action="store_true", help="evaluate a finished run's saved weights")
    add("--save_every", type=COUNT, default=500, help="steps between saves of the state to continue from")
    add("--log_with", choices=("none", *TRACKERS), default="none", help="log every epoch there too (wandb: offline)")
    add("--debug", **SHARED_OPTIONS["--debug"])

    add = parser.add_argument_group("training").add_argument
    add("--lr", type=RATE, help="learning rate (default: perpeft_hyperparameter.pickle's)")
    add("--wdecay", type=WEIGHT, help="weight decay (default: perpeft_hyperparameter.pickle's)")
    add("--batch_size", type=COUNT, default=16, help="users per batch")
    add("--global_epochs", type=COUNT, default=10, help="epochs of stage 1, global PEFT")
    add("--num_epochs", type=COUNT, default=20, help="epochs of stage 3, personalized PEFT")
    add("--l2_emb", type=WEIGHT, default=1e-6, help="weight of the L2 norm of the item embeddings")

    add = parser.add_argument_group("recommender").add_argument
    add("--maxlen", type=SIZE, default=10, help="longest history that is read")
    add("--hidden_units", type=SIZE, default=32, help="width")
    add("--num_blocks", type=BLOCKS, default=2, help="attention blocks")
    add("--num_heads", type=SIZE, default=4, help="attention heads per block")
    add("--dropout_rate", type=SHARE, default=0.3, help="dropout")
    add("--weight_scalar", type=WEIGHT, default=0.5, help="weight of the multimodal item vector")

    adapters = parser.add_argument_group("foundation model and adapters")
    add, of_peft = adapters.add_argument, "lora" in peft_types
    if of_peft:
        tuners = f"adapter: lora or ia3 (the paper's), or another tuner of peft: {', '.join(peft_types[2:])} (default: lora)"
        settings = "the adapter's settings, as peft's adapter_config.json has them (default: the paper's, or peft's)"
        twice = "compute layers twice instead of keeping them for the backward pass: less memory, the same result"
        precision = "arithmetic of the foundation model (default: fp16 on CUDA, as in the paper's code; fp32 elsewhere)"
        add("--peft_type", type=_peft_type, metavar="NAME", help=tuners)
        add("--peft_config", type=_peft_settings, metavar="FILE.json", help=settings)
        add("--rank", type=SIZE, default=PAPER_RANK, help="rank of lora and dora")
        add("--gradient_checkpointing", action="store_true", help=twice)
        add("--precision", choices=tuple(PRECISIONS), help=precision)
    else:
        parser.set_defaults(peft_type=peft_types[0], peft_config=None, rank=None, gradient_checkpointing=False, precision="fp32")
    add_model_options(adapters)
    add("--C", **SHARED_OPTIONS["--C"])
    add("--missing_images", **SHARED_OPTIONS["--missing_images"])

    add = parser.add_argument_group("comparison (the paper's Tables 2 and 3)").add_argument
    methods = (
        "perpeft: all three stages; the others train stage 1 alone, for --global_epochs + --num_epochs epochs: global (one "
        "adapter), large_global (one of C times the rank; LoRA), frozen (CLIP as it is), none (item embeddings only)"
    )
    negatives = "items that stage 3 draws negatives from (mixed: half from the group's, half from all; not the paper's)"
    source = "start stage 3 from a global model instead of training one: a run folder, or the authors' pretrained_models folder"
    add("--method", choices=[name for name in METHODS if of_peft or name != "large_global"], default="perpeft", help=methods)
    add("--modality", choices=tuple(MODALITIES), default="both", help="which parts of an item are used")
    add("--negatives", choices=("group", "all", "mixed"), default="group", help=negatives)
    add("--grouping", choices=("kmeans", "random"), default="kmeans", help="how stage 2 groups users")
    add("--init_from", help=source)
    return parser


def add_model_options(parser: argparse._ActionsContainer) -> None:
    """The options that name the foundation model."""
    clip = f"folder or hub name of a CLIP, SigLIP or another dual encoder (default: {DEFAULT_CLIP})"
    parser.add_argument("--clip_model", help=clip)
    parser.add_argument("--image_model", help="instead of --clip_model: an image encoder such as ViT, with --text_model")
    parser.add_argument("--text_model", help="a text encoder such as BERT, MiniLM or E5")
    parser.add_argument("--text_pooling", choices=TEXT_POOLINGS, help="what the text encoder pools (default: mean)")


def resolve_model(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Check which options of the foundation model go together, and fill in the defaults.

    A text encoder alone reads no images, so none need be there.
    """
    if options.text_model:
        if options.clip_model:
            parser.error("--clip_model and --text_model exclude each other: a dual encoder, or a pair of encoders")
        if not options.image_model and getattr(options, "modality", "text") != "text":
            parser.error("--text_model alone reads titles only; add --modality text, or an --image_model")
        options.text_pooling = options.text_pooling or "mean"
        if not options.image_model:
            options.missing_images = "unused"
        return
    for name in ("image_model", "text_pooling"):
        if getattr(options, name):
            parser.error(f"--{name} needs --text_model")
    options.clip_model = options.clip_model or ("demo" if options.dataset == "demo" else DEFAULT_CLIP)


def _resolve_adapter(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Fill in the kind of adapter, and check the settings that a file has for it."""
    settings = options.peft_config
    if settings is None:
        options.peft_type = options.peft_type or "lora"
        return
    named = settings["peft_type"].lower()
    if options.peft_type not in (None, named):
        parser.error(f"--peft_config is of {named}, --peft_type is {options.peft_type}; leave --peft_type out")
    if options.rank != parser.get_default("rank"):
        parser.error(f"--rank {options.rank} has no effect with --peft_config; set the rank in that file")
    options.peft_type = named
    options.peft_config = {name: value for name, value in sorted(settings.items()) if name not in ORIGIN}
    try:
        peft_config(named, settings=options.peft_config)
    except ValueError as error:
        parser.error(f"--peft_config: {error}")


def _check_method(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Check which options go together, and give methods without an adapter the same settings in both scripts."""
    method = options.method
    without_adapter = method in ("frozen", "none")
    by_method = {
        "negatives": method != "perpeft", "grouping": method != "perpeft", "init_from": method != "perpeft",
        "modality": method == "none", "peft_config": without_adapter or method == "large_global",
        "rank": without_adapter, "gradient_checkpointing": without_adapter, "precision": without_adapter,
    }  # fmt: skip
    unused = {name: f"--method {method}" for name, is_unused in by_method.items() if is_unused}
    if options.peft_type not in ("lora", "dora"):
        unused.setdefault("rank", f"--peft_type {options.peft_type}")
    for name, by in unused.items():
        value = getattr(options, name)
        if value != parser.get_default(name):
            shown = "" if name in ("peft_config", "gradient_checkpointing") else f" {value}"
            parser.error(f"--{name}{shown} has no effect with {by}; leave it out")
    if method == "large_global":
        if options.peft_type != "lora":
            parser.error("--method large_global needs --peft_type lora: only LoRA's rank can be raised")
        options.rank *= options.C
    if without_adapter:
        options.peft_type, options.rank, options.gradient_checkpointing, options.precision = method, None, False, "fp32"
    if method == "none":
        options.clip_model = options.image_model = options.text_model = options.text_pooling = None


def parse_options(description: str, peft_types: tuple[str, ...], arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse a training script's command line and fill in what depends on the data set.

    Learning rate and weight decay, where not given, are the demo's own, or come from perpeft_hyperparameter.pickle, or are 1e-4
    where it has no entry, as for methods without an adapter. `--dataset demo` is made on first use and brings its own CLIP.
    """
    parser = build_parser(description, peft_types)
    options = parser.parse_args(arguments)
    options.log_with = None if options.log_with == "none" else options.log_with
    if options.hidden_units % options.num_heads:
        parser.error(f"--num_heads {options.num_heads} must divide --hidden_units {options.hidden_units}")
    options.C = options.C or default_groups(options.dataset)
    resolve_model(parser, options)
    _resolve_adapter(parser, options)
    _check_method(parser, options)
    known, source = default_hyperparameters(options.dataset, options.peft_type)
    shown = []
    for name, check in (("lr", RATE), ("wdecay", WEIGHT)):
        is_given = getattr(options, name) is not None
        try:
            value = getattr(options, name) if is_given else check(str(known[name]))
        except argparse.ArgumentTypeError as error:
            parser.error(f"perpeft_hyperparameter.pickle's {name} for {options.dataset} and {options.peft_type}: {error}")
        setattr(options, name, value)
        shown.append(f"{name} {value:g} ({'given' if is_given else source})")
    print(*shown, sep=", ", flush=True)
    return options
