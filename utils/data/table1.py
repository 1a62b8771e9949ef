"""Users, items, interactions and images of the data sets in a folder, beside the paper's Table 1."""
import os
from pathlib import Path

import numpy as np

from utils.data.parsing import read_pairs
from utils.data.problems import Problems

COUNTS = ("users", "items", "interactions")
PAPER_TABLE1 = {  # interactions: users times the average length of a history
    "sports_outdoors": (25363, 15701, round(25363 * 7.5991)),
    "toys_games": (19026, 14718, round(19026 * 8.5330)),
    "beauty_care": (45490, 31151, round(45490 * 9.5379)),
    "arts": (24511, 18884, round(24511 * 9.4328)),
}


def dataset_names(target: Path) -> list[str]:
    """Names of the data sets of which a folder has interactions or images; the folder may be missing."""
    names = {path.name.removesuffix("_final.txt") for path in target.glob("?*_final.txt")}
    names |= {path.name.removesuffix("_images") for path in target.glob("?*_images") if path.is_dir()}
    return sorted(names)


def _count_dataset(target: Path, name: str) -> dict[str, str]:
    """Users, items, interactions and images of one data set: numbers, or "missing" or "unreadable"."""
    interactions, images = target / f"{name}_final.txt", target / f"{name}_images"
    counts = dict.fromkeys((*COUNTS, "images"), "missing")
    if interactions.is_file():
        problems = Problems()  # check_data reports them in full
        pairs = read_pairs(interactions, problems)
        numbers = (*(len(np.unique(column)) for column in pairs.T), len(pairs))
        counts |= {count: "unreadable" if problems else f"{number:,}" for count, number in zip(COUNTS, numbers)}
    if images.is_dir():
        counts["images"] = f"{sum(entry.name.endswith('.jpg') for entry in os.scandir(images)):,}"
    return counts


def dataset_table(target: Path) -> str:
    """The counts of every data set in a folder beside the paper's, and a line for each count that differs."""
    row = "{:<20}" + "{:>14}{:>10}" * 3 + "{:>14}"
    lines = [row.format("data set", "users", "paper", "items", "paper", "interactions", "paper", "images")]
    differences = []
    for name in dataset_names(target):
        found = _count_dataset(target, name)
        paper = {count: f"{value:,}" for count, value in zip(COUNTS, PAPER_TABLE1.get(name, ()))}
        cells = [cell for count in COUNTS for cell in (found[count], paper.get(count, "-"))]
        lines.append(row.format(name, *cells, found["images"]))
        different = [count for count in paper if paper[count] != found[count]]
        differences += [f"{name}: {found[count]} {count}, but {paper[count]} in the paper" for count in different]
    return "\n".join(lines + differences)
