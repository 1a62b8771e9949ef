"""Check a data set's files, images included, and print what they hold and all that is wrong; exit code 0 if usable, else 2."""
import sys

from models.item_encoder import MODALITIES
from utils.common.console import run_main, script_parser
from utils.data.dataset import default_groups
from utils.items.data_check import check_dataset
from utils.prepare.demo import make_demo
from utils.run.build import image_use


def main() -> None:
    """Parse, check, print."""
    parser = script_parser(__doc__, "--dataset", "--train_dir", "--missing_images", "--C")
    parser.add_argument("--modality", choices=tuple(MODALITIES), default="both", help="which parts of an item are used")
    options = parser.parse_args()
    if options.dataset == "demo":
        make_demo(options.train_dir)
    num_groups = options.C or default_groups(options.dataset)
    usable, text = check_dataset(options.train_dir, options.dataset, num_groups, image_use(options), options.modality)
    print(text)
    sys.exit(0 if usable else 2)


if __name__ == "__main__":
    run_main(main)
