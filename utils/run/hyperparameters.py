"""Learning rate and weight decay: the paper's best settings, and the file that the scripts read them from."""
from pathlib import Path

from utils.common.errors import PerPEFTError
from utils.common.files import write_pickle
from utils.common.pickles import load_pickle

HYPERPARAMETER_FILE = Path(__file__).resolve().parents[2] / "perpeft_hyperparameter.pickle"
# The paper's weight decay for each data set and adapter; its learning rate is 1e-4 everywhere.
PAPER_WEIGHT_DECAY = {
    "sports_outdoors": {"lora": 1e-4, "ia3": 1e-4, "iisan": 5e-4},
    "toys_games": {"lora": 5e-5, "ia3": 1e-4, "iisan": 1e-4},
    "beauty_care": {"lora": 1e-5, "ia3": 1e-5, "iisan": 5e-4},
    "arts": {"lora": 1e-4, "ia3": 5e-5, "iisan": 1e-5},
}


def write_hyperparameters(path: str | Path = HYPERPARAMETER_FILE) -> None:
    """Write the paper's settings as a pickle: {data set: {adapter: {"lr": .., "wdecay": ..}}}."""
    settings = PAPER_WEIGHT_DECAY.items()
    write_pickle(path, {name: {kind: {"lr": 1e-4, "wdecay": decay} for kind, decay in row.items()} for name, row in settings})


def read_hyperparameters(dataset: str, peft_type: str, path: str | Path = HYPERPARAMETER_FILE) -> dict[str, float] | None:
    """The file's settings for one data set and adapter, {"lr": .., "wdecay": ..}; None where it has none.

    Raises a PerPEFTError if the file is unreadable, or an entry is not of this form.
    """
    if not Path(path).is_file():
        return None
    try:
        entry = load_pickle(path).get(dataset, {}).get(peft_type)
        return None if entry is None else {"lr": float(entry["lr"]), "wdecay": float(entry["wdecay"])}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise PerPEFTError(
            f'{path} is not of the form {{data set: {{adapter: {{"lr": number, "wdecay": number}}}}}}; '
            "write it again with python3 -m scripts.write_hyperparameters"
        ) from None


def default_hyperparameters(dataset: str, peft_type: str) -> tuple[dict[str, float], str]:
    """The settings of a run that are not given, {"lr": .., "wdecay": ..}, and where they come from; as `read_hyperparameters`."""
    if dataset == "demo":
        # An epoch is 75 steps, too few for the paper's rate. At 1e-3, IISAN's items become alike in some seeds, so its rate was
        # chosen by valid NDCG@20.
        return {"lr": 3e-4 if peft_type == "iisan" else 1e-3, "wdecay": 1e-4}, "the demo's"
    known = read_hyperparameters(dataset, peft_type)
    return (known, HYPERPARAMETER_FILE.name) if known else ({"lr": 1e-4, "wdecay": 1e-4}, "default")
