"""Make a data set of your own two tables: first interactions, the core, titles, images from paths, addresses or a folder.

CSV, TSV or any separator, plain, .gz or .zst; Parquet; JSON lines; RecBole's atomic files; several files by a quoted pattern.
Columns are recognised by their usual names. Rows that cannot be used are left out and counted by reason. Interrupted, the same
command continues.
"""
import argparse

from utils.common.console import HelpFormatter, number, run_main
from utils.prepare.columns import add_table_options, require_item_columns, table_options_of
from utils.prepare.image_cells import ImageFinder
from utils.prepare.shop import Shop
from utils.prepare.tables import open_table
from utils.prepare.writer import add_image_options, add_target_options, prepare


def main() -> None:
    """Parse, prepare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--interactions", required=True, help="table of users, items and times; a file, folder or quoted pattern")
    parser.add_argument(
        "--items", required=True, help="table of items, titles and images (a path from its folder, or an address)"
    )
    add_target_options(parser)
    rating_help = "leave interactions with a lower rating out (default: keep all)"
    parser.add_argument("--min_rating", type=number(float, -1e9, 1e9), default=None, help=rating_help)
    add_image_options(parser, "folder of images named by the item's id or as the table names them")
    add_table_options(parser)
    options = parser.parse_args()
    columns = ("user", "item", "time") + (("rating",) if options.min_rating is not None else ())

    def open_shop(con) -> Shop:
        required, optional = (("item", "title"), ("image",)) if options.images else (("item", "title", "image"), ())
        interactions = open_table(con, options.interactions, columns, (), table_options_of(options))
        items = open_table(con, options.items, required, optional, table_options_of(options, of_items=True))
        require_item_columns(options, interactions.columns, items.columns)
        finder = ImageFinder(items.files[0].parent, options.images)
        return Shop(interactions, items, finder, options.time_format, options.min_rating)

    print(prepare(options, open_shop))


if __name__ == "__main__":
    run_main(main)
