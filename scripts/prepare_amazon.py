"""Make a data set of a category of Amazon Reviews 2023, 2018 or 2014: first interactions, the core, titles, images from the web.

Users and items with fewer than --core interactions are removed, round by round, until all have as many. Items without title or
image are left out before; those whose image fails are left out after, and the core is formed again. Interrupted, the same command
continues.
"""
import argparse
from pathlib import Path

from utils.common.console import HelpFormatter, run_main
from utils.prepare.amazon import META, REVIEWS, open_amazon
from utils.prepare.image_cells import ImageFinder
from utils.prepare.shop import Shop
from utils.prepare.writer import add_image_options, add_target_options, prepare


def main() -> None:
    """Parse, prepare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True, help="the category's reviews, .jsonl.gz or .jsonl")
    parser.add_argument("--meta", type=Path, required=True, help="the category's items, .jsonl.gz or .jsonl")
    add_target_options(parser)
    add_image_options(parser, "folder with {parent_asin}.jpg, in place of the web")
    options = parser.parse_args()

    def open_shop(con) -> Shop:
        meta_fields = META if options.images is None else META | {"image": ()}  # a folder stands in for the addresses
        reviews, meta = open_amazon(con, options.reviews, REVIEWS), open_amazon(con, options.meta, meta_fields)
        return Shop(reviews, meta, ImageFinder(options.meta.parent, options.images), first_row_counts=True)

    print(prepare(options, open_shop))


if __name__ == "__main__":
    run_main(main)
