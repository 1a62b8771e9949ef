"""Check a data set's files, images included, and print what they hold and all that is wrong; exit code 0 if usable, else 2."""
import argparse
import sys

from utils.common.console import HelpFormatter, number, run_main
from utils.items.data_check import check_dataset
from utils.prepare.demo import make_demo


def main() -> None:
    """Parse, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--dataset", required=True, help="name of the data set; 'demo' makes its own")
    parser.add_argument("--train_dir", default="./dataset", help="folder of the data sets")
    parser.add_argument("--C", type=number(int, 1), default=8, help="number of user groups; the data set needs as many users")
    parser.add_argument("--missing_images", choices=("error", "blank"), default="error", help="what to do without an image")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    if options.dataset == "demo":
        make_demo(options.train_dir)
    report = check_dataset(options.train_dir, options.dataset, options.C, options.missing_images)
    print(report)
    sys.exit(0 if report.usable else 2)


if __name__ == "__main__":
    run_main(main)
