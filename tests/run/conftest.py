"""Runs that have not started."""
from types import SimpleNamespace

import pytest

from tests.conftest import RUN, fresh_data, tiny_arguments


@pytest.fixture
def begin(tiny_dataset, tiny_clip, tmp_path):
    """Make a fresh copy of the data, without what runs keep beside it, and return the arguments and the folder of a tiny run."""

    def make(name="run", kind="lora", **changes):
        data = fresh_data(tiny_dataset, tmp_path / name / "dataset")
        peft_type = None if kind == "iisan" else kind  # its script knows one kind only
        arguments = tiny_arguments(data, tiny_clip, tmp_path / name / "runs", peft_type, **{"save_every": 1, **changes})
        folder = tmp_path / name / "runs" / RUN.format(kind)
        return SimpleNamespace(arguments=arguments, folder=folder, train_dir=data.train_dir)

    return make
