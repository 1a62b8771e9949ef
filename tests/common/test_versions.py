"""Versions of libraries that do not work together are refused before any of them is imported."""
import contextlib
import subprocess
import sys
from importlib import metadata

import pytest

from tests.zygote import ROOT
from utils.common.errors import PerPEFTError
from utils.common.versions import check_versions, has_fused_adamw


def pretend(monkeypatch, versions):
    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.parametrize(
    "versions, refused",
    [
        ({"torch": "2.2.0", "numpy": "1.26.3", "transformers": "4.49.0"}, ""),
        ({"torch": "2.2.0", "numpy": "2.0.1", "transformers": "4.49.0"}, "numpy 2.0.1"),
        ({"torch": "2.2.2+cu121", "numpy": "2.4.6", "transformers": "5.0.0"}, "numpy 2.4.6 and transformers 5.0.0"),
        ({"torch": "2.3.1", "numpy": "2.4.6", "transformers": "4.57.6"}, ""),
        ({"torch": "2.3.1", "numpy": "2.4.6", "transformers": "5.24.0"}, "transformers 5.24.0"),
        ({"torch": "2.4.0", "numpy": "2.4.6", "transformers": "5.24.0"}, ""),
        ({"torch": "2.14.1+cpu", "numpy": "1.26.4", "transformers": "4.49.0"}, ""),
        ({"numpy": "2.4.6"}, ""),  # data is unpacked before torch is installed
    ],
)
def test_too_new_for_the_installed_torch_is_refused_by_name(monkeypatch, versions, refused):
    pretend(monkeypatch, versions)
    expected = pytest.raises(PerPEFTError, match=f"torch 2.[23].* cannot work with {refused}; .*constraints")
    with expected if refused else contextlib.nullcontext():
        check_versions()


@pytest.mark.parametrize("script", ["perpeft_lora_ia3.py", "perpeft_iisan.py", "scripts/recommend.py"])
def test_scripts_say_so_in_one_sentence_with_exit_code_2(tmp_path, script):
    """A torch that is too old is found first on the path; it is never imported."""
    for name, version in (("torch", "2.2.0"), ("transformers", "5.0.0")):
        place = tmp_path / f"{name}-{version}.dist-info"
        place.mkdir()
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    module = script.removesuffix(".py").replace("/", ".")
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: torch 2.2.0 cannot work with ") and done.stderr.count("\n") == 1


def test_fused_adamw_on_a_cpu_from_torch_2_4_on(monkeypatch):
    for torch, on_cpu in (("2.2.0", False), ("2.3.1", False), ("2.4.0", True), ("2.13.0+cpu", True)):
        pretend(monkeypatch, {"torch": torch})
        assert (has_fused_adamw("cpu"), has_fused_adamw("cuda"), has_fused_adamw("mps")) == (on_cpu, True, False)
