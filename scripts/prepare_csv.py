"""Make a data set of a shop's own two CSV files: first purchases, the core, titles, and images from the disk.

--interactions has the columns user, item, time (numbers or ISO dates); --items has item, title, image (a path, from the folder of
that file). Items without title, or whose image is none, are left out before the core is formed.
"""
import argparse
import os
from pathlib import Path

from utils.common.console import HelpFormatter, run_main
from utils.prepare.image_folder import read_image
from utils.prepare.shop_tables import ShopTables
from utils.prepare.writer import add_target_options, prepare, target_of


def main() -> None:
    """Parse, prepare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--interactions", type=Path, required=True, help="CSV file with the columns user, item, time")
    parser.add_argument("--items", type=Path, required=True, help="CSV file with the columns item, title, image")
    add_target_options(parser)
    options = parser.parse_args()
    shop = ShopTables(options.interactions, options.items)
    print(prepare(target_of(options), shop, read_image, workers=os.cpu_count() or 1))


if __name__ == "__main__":
    run_main(main)
