"""Compute CLIP's hidden states of a data set's items for IISAN and save them as {name}_preX.pt."""
import argparse

import torch

from utils.common.console import HelpFormatter, run_main
from utils.common.devices import choose_device
from utils.data.dataset import read_dataset
from utils.items.foundation import ensure_hidden_states
from utils.items.hidden_states import states_path
from utils.prepare.demo import make_demo
from utils.run.build import clip_folder, foundation_name
from utils.run.options import add_model_options, resolve_model


def main() -> None:
    """Parse, compute, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--dataset", required=True, help="name of the data set; 'demo' makes its own")
    parser.add_argument("--train_dir", default="./dataset", help="folder of the data sets")
    add_model_options(parser)
    parser.add_argument("--device", default=None, help="cuda:N, cpu or mps (default: cuda:0 where there is one, else cpu)")
    parser.add_argument("--missing_images", choices=("error", "blank"), default="error", help="what to do without an image")
    parser.add_argument("--restart", action="store_true", help="compute them anew where they are there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    resolve_model(parser, options)
    if options.dataset == "demo":
        make_demo(options.train_dir)
    dataset = read_dataset(options.train_dir, options.dataset, missing_images=options.missing_images)
    device = torch.device(choose_device(options.device))
    path = states_path(options.train_dir, options.dataset)
    there = path.is_file()
    clip_model = clip_folder(foundation_name(options), dataset)
    ensure_hidden_states(dataset, clip_model, device, options.missing_images, anew=options.restart)
    print(f"{path} {'was there already (--restart computes it anew)' if there and not options.restart else 'is written'}")


if __name__ == "__main__":
    run_main(main)
