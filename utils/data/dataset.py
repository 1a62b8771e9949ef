"""A data set: interaction histories, raw ids, titles and image paths, read from its files with all problems reported at once."""
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.common.errors import PerPEFTError
from utils.data.histories import FEWEST_INTERACTIONS, Histories, leave_last_out
from utils.data.image_names import image_file_name
from utils.data.images import on_all_cores, try_image
from utils.data.parsing import MISSING_TITLE, find_images, read_pairs, read_raw_ids, read_titles
from utils.data.problems import BLANK_IMAGES, UNREADABLE_IMAGES, Problems, format_image_problem
from utils.data.table1 import PAPER_TABLE1

PAPER_GROUPS = 8  # C


def default_groups(name: str) -> int:
    """How many groups a data set's users are put into unless --C says so: the paper's C; the demo is drawn with four."""
    return 4 if name == "demo" else PAPER_GROUPS


@dataclass(frozen=True)
class Dataset:
    """One data set; list position i belongs to item i + 1, history row u to user `user_ids[u]`.

    Attributes:
        user_ids: the users' numbers in the file, [users].
        raw_ids: the items' ids in the shop.
        titles: MISSING_TITLE for items without one.
        image_paths: image files, not opened yet and possibly missing.
    """

    name: str
    folder: Path
    user_ids: np.ndarray
    histories: Histories
    raw_ids: list[str]
    titles: list[str]
    image_paths: list[Path]
    missing_titles: int

    @property
    def num_items(self) -> int:
        """Items are 1..num_items."""
        return len(self.raw_ids)

    @property
    def num_users(self) -> int:
        """How many users there are."""
        return self.histories.num_users

    def counts(self) -> dict[str, int]:
        """Users, items and interactions, as in the columns of the paper's Table 1."""
        return {"users": self.num_users, "items": self.num_items, "interactions": len(self.histories.items)}


def is_dataset_name(name: str) -> bool:
    """Whether a name can begin a file name, and cannot lead into another folder."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def require_dataset(train_dir: str | Path, name: str) -> None:
    """Raise a PerPEFTError if there is no such data set, with how to get it, or its name could lead into another folder."""
    if not is_dataset_name(name):
        raise PerPEFTError(f"data set '{name}': expected a name, not a path; pass its folder as --train_dir")
    if not (Path(train_dir) / f"{name}_final.txt").is_file():
        found = ", ".join(sorted(path.name.removesuffix("_final.txt") for path in Path(train_dir).glob("*_final.txt"))) or "none"
        advice = "Write its files as docs/your_data.md describes, or choose another by --dataset or --train_dir."
        if name in PAPER_TABLE1:
            advice = "Download mmrec_datasets.zip by the link in README's section Data, then run python3 unzip_data.py."
        missing = f"{name}_final.txt is missing (data sets there: {found})"
        raise PerPEFTError(f"data set '{name}' is not in {train_dir}: {missing}. {advice}")


@dataclass
class Inspection:
    """A data set, fit for training only if there are no problems, and remarks: what is worth knowing, such as missing titles.

    Attributes:
        present: the image files that are there, by item number.
    """

    dataset: Dataset
    problems: Problems
    remarks: Problems
    present: dict[int, Path]

    def try_images(self, missing_images: str = "error") -> list[int]:
        """Decode every image file, on all cores; note the unreadable ones, as remarks for "blank", and return their items."""
        paths = list(self.present.values())
        outcomes = tqdm(on_all_cores(try_image, paths), "checking images", len(paths), unit="image", disable=None)
        errors = {item: error for item, error in zip(self.present, outcomes) if error is not None}
        examples = [format_image_problem(self.present[item], item, error) for item, error in errors.items()]
        if missing_images == "error":
            self.problems.add(UNREADABLE_IMAGES, examples)
        else:
            self.remarks.add(BLANK_IMAGES, examples)
        return list(errors)


def inspect_dataset(
    train_dir: str | Path, name: str, contents: bool = True, missing_images: str = "error", num_groups: int = 1
) -> Inspection:
    """Read a data set's files as `read_dataset` does and collect what is wrong with them; images are not opened.

    Raises:
        PerPEFTError: there is no such data set.
    """
    require_dataset(train_dir, name)
    folder, problems, remarks = Path(train_dir), Problems(), Problems()
    final = folder / f"{name}_final.txt"
    try:
        pairs = read_pairs(final, problems)
    except OSError as error:
        raise PerPEFTError(f"{final} cannot be read ({error.strerror})") from error
    raw_ids = read_raw_ids(folder / f"{name}_item2id_final.pickle", np.unique(pairs[:, 1]), problems)
    titles, present = [MISSING_TITLE] * len(raw_ids), {}
    images = folder / f"{name}_images"
    if contents:
        titles = read_titles(folder / f"{name}_texts_final.pickle", list(raw_ids.values()), problems, remarks)
        present = {} if missing_images == "unused" else find_images(images, raw_ids, missing_images, problems, remarks)

    order = np.argsort(pairs[:, 0], kind="stable")
    user_ids, counts = np.unique(pairs[:, 0], return_counts=True)
    histories = Histories(pairs[order, 1], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    if 0 < len(counts) < num_groups:
        problems.add(f"fewer users than the {num_groups} groups of --C", [f"{len(counts)} users"])
    if 0 < counts.max(initial=0) < FEWEST_INTERACTIONS:
        kind = f"no user with the {FEWEST_INTERACTIONS} interactions that evaluation needs; most interactions of one user"
        problems.add(kind, [counts.max()])
    if not problems:
        every = leave_last_out(histories).train.has_every_item(len(raw_ids))
        kind = ("users with every item in their training history: without possible negatives, they are left out of training "
                "but still evaluated")
        remarks.add(kind, [f"user {user}" for user in user_ids[every]])

    image_paths = [present.get(item) or images / image_file_name(raw_id) for item, raw_id in raw_ids.items()]
    missing_titles = titles.count(MISSING_TITLE) if contents else 0
    dataset = Dataset(name, folder, user_ids, histories, list(raw_ids.values()), titles, image_paths, missing_titles)
    return Inspection(dataset, problems, remarks, present)


def read_dataset(
    train_dir: str | Path, name: str, contents: bool = True, missing_images: str = "error", num_groups: int = 1
) -> Dataset:
    """Read a data set's histories, raw ids and titles, and look up its images; remarks are printed to stderr.

    Files, in `train_dir`: `{name}_final.txt` (lines `user item`, from 1, in time order), `{name}_item2id_final.pickle`
    (item to raw id), `{name}_texts_final.pickle` (raw id to title), `{name}_images/{raw id}.jpg` (see `image_file_name`).

    Images are opened here only if something else is wrong, so that one report names everything; else when the store is built.

    Args:
        contents: whether titles and images are needed; if not, they may be missing.
        missing_images: "error", "blank" to accept items without an image file, or "unused" to look for none.
        num_groups: how many groups the users will be put into (--C).
    Raises:
        PerPEFTError: all that is wrong with the files, the first ten of each kind and the counts.
    """
    found = inspect_dataset(train_dir, name, contents, missing_images, num_groups)
    if found.problems and found.present and missing_images == "error":
        found.try_images()
    if found.remarks:
        print(f"warning: data set '{name}':\n{found.remarks}", file=sys.stderr)
    found.problems.raise_any(f"data set '{name}' in {found.dataset.folder} cannot be used:")
    return found.dataset


def read_true_groups(dataset: Dataset) -> list[str] | None:
    """Each user's true group, in row order, if generated data has them in `{name}_true_groups.csv`; else None."""
    path = dataset.folder / f"{dataset.name}_true_groups.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            group_of = {row["user"]: row["group"] for row in csv.DictReader(file)}
        return [group_of[str(user)] for user in dataset.user_ids]
    except (OSError, KeyError, ValueError, csv.Error):  # nothing depends on it
        return None
