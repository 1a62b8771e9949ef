"""Compute a foundation model's hidden states of a data set's items for IISAN and save them as {name}_preX.pt."""
import torch

from models.item_encoder import MODALITIES
from utils.common.console import run_main, script_parser
from utils.common.devices import choose_device
from utils.data.dataset import read_dataset
from utils.items.foundation import ensure_hidden_states
from utils.items.hidden_states import has_states
from utils.prepare.demo import make_demo
from utils.run.build import foundation_name, image_use, resolve_foundation
from utils.run.options import add_model_options, resolve_model


def main() -> None:
    """Parse, compute, print."""
    parser = script_parser(__doc__, "--dataset", "--train_dir", "--device", "--missing_images")
    add_model_options(parser)
    parser.add_argument("--modality", choices=tuple(MODALITIES), help="default: both; text without an image model")
    parser.add_argument("--restart", action="store_true", help="compute them again if they exist")
    options = parser.parse_args()
    options.modality = options.modality or ("text" if options.text_model and not options.image_model else "both")
    resolve_model(parser, options)
    if options.dataset == "demo":
        make_demo(options.train_dir)
    images = image_use(options)
    dataset = read_dataset(options.train_dir, options.dataset, missing_images=images)
    device = torch.device(choose_device(options.device))
    there = has_states(options.train_dir, options.dataset, options.modality)
    clip_model = resolve_foundation(foundation_name(options), dataset)
    path = ensure_hidden_states(dataset, clip_model, device, images, options.modality, options.restart)
    print(f"{path} {'was there already (--restart computes it again)' if there and not options.restart else 'is written'}")


if __name__ == "__main__":
    run_main(main)
