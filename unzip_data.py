"""mmrec_datasets.zip -> ./dataset, ready for training; started again after an interruption, it continues."""
import sys
from pathlib import Path

from utils.common.console import run_main, script_parser
from utils.data.archives import unpack_all
from utils.data.table1 import dataset_table


def main() -> None:
    """Parse, unpack, print what is there."""
    parser = script_parser(__doc__)
    parser.add_argument("--archive", type=Path, default="mmrec_datasets.zip", help="the downloaded zip")
    parser.add_argument("--target", type=Path, default="./dataset", help="the folder that the data sets go to")
    parser.add_argument("--keep", action="store_true", help="keep the archives instead of deleting each once it is unpacked")
    options = parser.parse_args()
    try:
        for archive in unpack_all(options.archive, options.target, options.keep):
            print(f"{archive}: all of it is verified on disk, the archive is {'kept' if options.keep else 'deleted'}")
    except KeyboardInterrupt:
        print("\nthe same command continues where this one stopped", file=sys.stderr)
        raise
    print(dataset_table(options.target))


if __name__ == "__main__":
    run_main(main)
