"""Everything that can be said about a data set's files before training: the counts, and all that is wrong with them."""
from pathlib import Path
from typing import NamedTuple

from utils.common.errors import PerPEFTError
from utils.data.dataset import inspect_dataset
from utils.data.histories import leave_last_out
from utils.items.hidden_states import HiddenStateStore, has_states


class Check(NamedTuple):
    """Whether training would start, and a text with counts, remarks, problems and the verdict."""

    usable: bool
    text: str


def check_dataset(
    train_dir: str | Path, name: str, num_groups: int, missing_images: str = "error", modality: str = "both"
) -> Check:
    """Check all files of a data set, every image included unless titles alone are used, and count what they hold.

    Arguments and errors are those of `inspect_dataset`, and which hidden states are needed: "both", "image" or "text".
    """
    found = inspect_dataset(train_dir, name, missing_images=missing_images, num_groups=num_groups)
    unreadable = found.try_images(missing_images) if found.present else []
    dataset = found.dataset
    states = "none yet"  # they are computed on first use
    if has_states(train_dir, name, modality):
        try:
            HiddenStateStore.open(dataset, modality=modality)
            states = "found"
        except PerPEFTError as error:
            found.problems.add("hidden states", [" ".join(str(error).split())])
            states = "unusable"
    counts = dataset.counts()  # the columns of the paper's Table 1, and what else training depends on
    counts |= {
        "interactions per user (mean)": f"{counts['interactions'] / max(1, counts['users']):,.2f}",
        "images found": "unused" if missing_images == "unused" else len(found.present) - len(unreadable),
        "titles missing": dataset.missing_titles,
        "users evaluated": len(leave_last_out(dataset.histories).evaluated_users),
        "hidden states": states,
    }
    lines = [f"data set '{name}' in {dataset.folder}"]
    lines += [f"  {what:<28}{count if isinstance(count, str) else f'{count:,}':>12}" for what, count in counts.items()]
    if found.remarks:
        lines += ["worth knowing:", str(found.remarks)]
    lines += ["cannot be used:", str(found.problems)] if found.problems else ["usable"]
    return Check(not found.problems, "\n".join(lines))
