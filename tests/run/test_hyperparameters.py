"""The hyperparameter pickle is the paper's table, plain values in a pickle."""
import pickle
import pickletools

import pytest

from scripts import write_hyperparameters as write_script
from tests.conftest import exit_code
from utils.common.errors import PerPEFTError
from utils.run.hyperparameters import HYPERPARAMETER_FILE, read_hyperparameters, write_hyperparameters

# The paper: weight decay of lora / ia3 / iisan; the learning rate is 1e-4 always
PAPER = {"sports_outdoors": (1e-4, 1e-4, 5e-4), "toys_games": (5e-5, 1e-4, 1e-4), "beauty_care": (1e-5, 1e-5, 5e-4),
         "arts": (1e-4, 5e-5, 1e-5)}  # fmt: skip
KINDS = ("lora", "ia3", "iisan")
TABLE = {name: {kind: {"lr": 1e-4, "wdecay": decay} for kind, decay in zip(KINDS, decays)} for name, decays in PAPER.items()}


def test_file_in_the_repository_is_the_papers_table_in_plain_values(tmp_path):
    assert HYPERPARAMETER_FILE.name == "perpeft_hyperparameter.pickle"
    data = HYPERPARAMETER_FILE.read_bytes()
    assert pickle.loads(data) == TABLE
    assert not [opcode.name for opcode, _, _ in pickletools.genops(data) if "GLOBAL" in opcode.name or opcode.name == "REDUCE"]
    write_hyperparameters(tmp_path / "table.pickle")
    assert (tmp_path / "table.pickle").read_bytes() == data and len(list(tmp_path.iterdir())) == 1
    assert read_hyperparameters("arts", "ia3") == TABLE["arts"]["ia3"]
    assert read_hyperparameters("arts", "ia3", tmp_path / "missing.pickle") is None
    modified = HYPERPARAMETER_FILE.stat().st_mtime_ns
    assert exit_code(["--help"], write_script.main) == 0 and HYPERPARAMETER_FILE.stat().st_mtime_ns == modified


@pytest.mark.parametrize(
    "value",
    [["arts"], {"arts": 3}, {"arts": {"lora": {"lr": 1e-4}}}, {"arts": {"lora": {"lr": "fast", "wdecay": 1e-4}}}, {"arts": None}],
)
def test_file_of_another_form_is_reported(tmp_path, value):
    path = tmp_path / "table.pickle"
    path.write_bytes(pickle.dumps(value))
    with pytest.raises(PerPEFTError, match="table.pickle"):
        read_hyperparameters("arts", "lora", path)
