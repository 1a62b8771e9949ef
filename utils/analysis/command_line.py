"""Options of the scripts for finished runs, and raw ids on the command line, which may begin with a dash."""
import argparse
import sys
from pathlib import Path
from typing import Any

from utils.common.console import script_parser
from utils.run.build import MODEL_OPTIONS


def run_folder_parser(description: str, several: bool = False) -> argparse.ArgumentParser:
    """The options of a script that opens a finished run, or `several`; a script adds its own."""
    parser = script_parser(description, "--train_dir", "--device")
    parser.add_argument("run_folder", type=Path, nargs="+" if several else None, help="folder of a finished run, as in ./runs")
    for option in MODEL_OPTIONS:
        parser.add_argument(f"--{option}", help=f"folder of the run's --{option}, if it was moved since training")
    return parser


def place_of(options: argparse.Namespace) -> dict[str, Any]:
    """Where the data and the models lie now, and the device, as `finished_options` and `open_finished` take them."""
    models = {option: getattr(options, option) for option in MODEL_OPTIONS}
    return {"train_dir": options.train_dir, "device": options.device, "models": models}


def raw_id(text: str) -> str:
    """The option type of a raw id; undoes what `parse_raw_ids` does to those with a dash."""
    return text.removeprefix("\0")


def parse_raw_ids(parser: argparse.ArgumentParser, option: str) -> argparse.Namespace:
    """Parse the command line; after `option`, a word that begins with a dash is a raw id unless it names an option.

    The shops' own ids begin with a dash now and then, and argparse would take them for options.
    """
    known, arguments, in_option = set(parser._option_string_actions), [], False
    for word in sys.argv[1:]:
        name = word.partition("=")[0]
        if name in known:
            in_option = name == option
        elif in_option and word.startswith("-"):
            word = f"\0{word}"  # which no command line can hold
        arguments.append(word)
    return parser.parse_args(arguments)


def html_path(text: str) -> Path:
    """The option type of a page to write."""
    if not text.lower().endswith(".html"):
        raise argparse.ArgumentTypeError(f"'{text}': expected a name that ends in .html")
    return Path(text)
