"""The fields of Amazon Reviews 2023, 2018 and 2014: two JSON lines files a category."""

from pathlib import Path

from utils.prepare.json_files import json_part
from utils.prepare.tables import Table, files_of

REVIEWS = {  # by role, the first field with a value counts; all releases name their fields differently
    "user": ("user_id", "reviewerID"),
    "item": ("parent_asin", "asin"),
    "time": ("timestamp", "unixReviewTime"),
}
RATING = {"rating": ("rating", "overall")}
META = {
    "item": ("parent_asin", "asin"),
    "title": ("title",),
    "image": ("images", "imageURLHighRes", "imageURL", "imUrl"),
}


def open_reviews(pattern: str | Path, with_rating: bool = False) -> Table:
    """A category's reviews; see `utils.prepare.tables.Table`."""
    return _open(pattern, REVIEWS | (RATING if with_rating else {}))


def open_meta(pattern: str | Path, with_images: bool = True) -> Table:
    """A category's items; without `with_images` their addresses are not read."""
    return _open(pattern, META if with_images else META | {"image": ()})


def _open(pattern: str | Path, fields: dict[str, tuple[str, ...]]) -> Table:
    parts = [json_part(path, fields) for path in files_of(pattern)]
    return Table(parts, {role: "/".join(names) for role, names in fields.items()})
