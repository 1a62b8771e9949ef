"""Make a data set of a category of Amazon Reviews 2023: first purchases, the core, titles, and images from the web.

Users and items with fewer than --core purchases are removed, round by round, until all have as many. Items without title or
image are left out before; those whose image cannot be fetched are left out after, and the core is formed anew. Interrupted,
the same command goes on.
"""
import argparse
from pathlib import Path

from utils.common.console import HelpFormatter, number, run_main
from utils.prepare.amazon import AmazonCategory
from utils.prepare.downloads import Downloader
from utils.prepare.image_folder import read_image
from utils.prepare.writer import add_target_options, prepare, target_of


def main() -> None:
    """Parse, prepare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--reviews", type=Path, required=True, help="the category's reviews, .jsonl.gz or .jsonl")
    parser.add_argument("--meta", type=Path, required=True, help="the category's items, .jsonl.gz or .jsonl")
    add_target_options(parser)
    images = parser.add_argument_group("images")
    images.add_argument("--images", type=Path, default=None, help="folder with {parent_asin}.jpg, in place of the web")
    images.add_argument("--workers", type=number(int, 1, 256), default=16, help="images fetched at once")
    images.add_argument("--retries", type=number(int, 0, 20), default=3, help="further attempts where one may help")
    images.add_argument("--timeout", type=number(float, 0, 3600, above=True), default=30, help="seconds an attempt may take")
    images.add_argument("--max_image_bytes", type=number(int, 1, 2**30), default=10 * 2**20, help="largest image taken")
    images.add_argument(
        "--give_up", type=number(int, 0), default=100, help="stop when so many images in a row get no usable answer; 0: never"
    )
    options = parser.parse_args()

    category = AmazonCategory(options.reviews, options.meta, options.images)
    if options.images is None:
        web = Downloader(options.retries, options.timeout, options.max_image_bytes)
        print(prepare(target_of(options), category, web.get, options.workers, web.stop, options.give_up))
    else:
        print(prepare(target_of(options), category, read_image, options.workers))


if __name__ == "__main__":
    run_main(main)
