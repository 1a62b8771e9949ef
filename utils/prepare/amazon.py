"""The fields of Amazon Reviews 2023, 2018 and 2014: two JSON lines files a category."""
from pathlib import Path

import duckdb

from utils.prepare.json_files import json_part
from utils.prepare.tables import Table, files_of

REVIEWS = {  # by role, the first field with a value counts; all releases name their fields differently
    "user": ("user_id", "reviewerID"),
    "item": ("parent_asin", "asin"),
    "time": ("timestamp", "unixReviewTime"),
}
META = {
    "item": ("parent_asin", "asin"),
    "title": ("title",),
    "image": ("images", "imageURLHighRes", "imageURL", "imUrl"),
}


def open_amazon(con: duckdb.DuckDBPyConnection, pattern: Path, fields: dict[str, tuple[str, ...]]) -> Table:
    """A category's reviews or items, of which only these fields are read."""
    return Table(con, [json_part(path, fields) for path in files_of(pattern)])
