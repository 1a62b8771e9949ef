"""Users, items, interactions and images of the data sets in a folder, beside the paper's Table 1."""
import os
from pathlib import Path

import numpy as np

from utils.data.parsing import read_pairs
from utils.data.problems import Problems

PAPER_TABLE1 = {  # users, items, average length of a history
    "sports_outdoors": (25363, 15701, 7.5991),
    "toys_games": (19026, 14718, 8.5330),
    "beauty_care": (45490, 31151, 9.5379),
    "arts": (24511, 18884, 9.4328),
}
COUNTS = ("users", "items", "interactions")


def paper_counts(name: str) -> dict[str, int]:
    """Users, items and interactions of one of the paper's data sets; nothing of any other."""
    if name not in PAPER_TABLE1:
        return {}
    users, items, length = PAPER_TABLE1[name]
    return {"users": users, "items": items, "interactions": round(users * length)}


def dataset_names(target: str | Path) -> list[str]:
    """Names of the data sets of which a folder has interactions or images; the folder may be missing."""
    target = Path(target)
    names = {path.name.removesuffix("_final.txt") for path in target.glob("?*_final.txt")}
    names |= {path.name.removesuffix("_images") for path in target.glob("?*_images") if path.is_dir()}
    return sorted(names)


def count_dataset(target: str | Path, name: str) -> dict[str, int | str]:
    """Users, items, interactions and images of one data set: numbers, or "missing" or "unreadable"."""
    interactions, images = Path(target) / f"{name}_final.txt", Path(target) / f"{name}_images"
    counts: dict[str, int | str] = dict.fromkeys((*COUNTS, "images"), "missing")
    if interactions.is_file():
        problems = Problems()  # check_data reports them in full
        pairs = read_pairs(interactions, problems)
        users, items = (len(np.unique(column)) for column in pairs.T)
        counts |= dict(zip(COUNTS, ("unreadable",) * 3 if problems else (users, items, len(pairs))))
    if images.is_dir():
        counts["images"] = sum(entry.name.endswith(".jpg") for entry in os.scandir(images))
    return counts


def dataset_table(target: str | Path) -> str:
    """The counts of every data set in a folder beside the paper's, and a line for each count that differs."""
    rows = [["data set", *(title for count in COUNTS for title in (count, "paper")), "images"]]
    differences = []
    for name in dataset_names(target):
        found, paper = count_dataset(target, name), paper_counts(name)
        cells = [cell for count in COUNTS for cell in (found[count], paper.get(count, "-"))]
        rows.append([name, *map(_digits, cells), _digits(found["images"])])
        differences += [
            f"{name}: {_digits(found[count])} {count}, but {value:,} in the paper"
            for count, value in paper.items()
            if value != found[count]
        ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join(lines + differences)


def _digits(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value
