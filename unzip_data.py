"""mmrec_datasets.zip -> ./dataset, ready for training; started again after an interruption, it continues."""
import argparse
import sys
import traceback

from utils.common.errors import PerPEFTError
from utils.data.archives import unpack_all
from utils.data.table1 import dataset_table


def main(argv: list[str] | None = None) -> int:
    """Unpack, then print what is there; returns 0, 2 after an error that the user can fix, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--archive", default="mmrec_datasets.zip", help="the downloaded zip")
    parser.add_argument("--target", default="./dataset", help="the folder that the data sets go to")
    parser.add_argument("--keep", action="store_true", help="keep the archives instead of deleting each once it is unpacked")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    try:
        for archive in unpack_all(args.archive, args.target, args.keep):
            print(f"{archive}: all of it is verified on disk, the archive is {'kept' if args.keep else 'deleted'}")
        print(dataset_table(args.target))
    except PerPEFTError as error:
        if args.debug:
            traceback.print_exc()
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted: start the same command again and it continues where it stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
