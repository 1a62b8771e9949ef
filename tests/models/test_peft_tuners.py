"""Every tuner of the installed peft that works on linear layers: one adapter a group, saved as peft opens it."""
import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import CLIPModel

from models.peft_configs import PEFT_TYPES
from tests.conftest import adapter_parameters, run_script, tiny_arguments, tiny_options, trained
from tests.models.conftest import features, shake
from tests.plain import clip_features
from utils.common.errors import PerPEFTError
from utils.run.finished import open_finished
from utils.training.checkpoints import load_adapter, save_adapter


@pytest.mark.parametrize("kind", PEFT_TYPES)
@torch.no_grad()
def test_every_group_has_an_adapter_of_its_own_which_opens_with_peft(kind, tiny_clip, make_encoder, inputs, tmp_path):
    def by_group(encoder):
        return [features(encoder, inputs, group) for group in range(3)]

    encoder, other = make_encoder(kind), make_encoder(kind)
    shake(encoder.group_parameters(0).values(), size=0.1)
    encoder.clone_groups(3)
    other.clone_groups(3)
    assert not any(module.training for module in encoder.modules())  # a fresh adapter would drop out in evaluation
    same = by_group(encoder)
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    alone = encoder(inputs.pixels[:1], inputs.tokens[:1])
    torch.testing.assert_close(alone, same[2][:1], rtol=0, atol=1e-5)  # whichever items are encoded with it

    for group in range(3):
        shake(encoder.group_parameters(group).values(), group + 1, 0.1)
        save_adapter(encoder, tmp_path / str(group), group)
        load_adapter(other, tmp_path / str(group), 2 - group)
    own = by_group(encoder)
    assert (own[0] - own[1]).abs().max() > 1e-4
    torch.testing.assert_close(by_group(other), own[::-1], rtol=0, atol=1e-6)
    for group in range(3):
        opened = PeftModel.from_pretrained(CLIPModel.from_pretrained(tiny_clip), tmp_path / str(group) / "adapter")
        torch.testing.assert_close(clip_features(opened, inputs.of_clip), own[group], rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "0" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_clip)
    listed = [id(parameter) for parameter in adapter_parameters(other)]
    assert len(set(listed)) == len(listed) > 0
    for group in (1, 2, 0):  # loading freezes none; in one order, by which the state that training continues from lists them
        other.use_group(group)
        assert [id(parameter) for parameter in other.parameters() if parameter.requires_grad] == listed


@pytest.mark.parametrize("kind", ["lora", "ia3", "dora", "vera", "oft"])
@pytest.mark.parametrize("modality, used, unused", [
    ("text", "text_model", "vision_model"), ("image", "vision_model", "text_model"),
])  # fmt: skip
def test_one_modality_leaves_the_other_tower_without_adapters_and_gradients(kind, modality, used, unused, make_encoder, inputs):
    encoder, both = make_encoder(kind, modality=modality), make_encoder(kind)
    found = features(encoder, inputs)
    half = slice(0, 16) if modality == "image" else slice(16, 32)
    assert found.shape[1] == encoder.feature_dim == 16
    torch.testing.assert_close(found, features(both, inputs)[:, half])  # fresh adapters change nothing
    other = {"text": (torch.zeros_like(inputs.pixels), inputs.tokens), "image": (inputs.pixels, inputs.tokens.flip(0))}
    assert torch.equal(found, encoder(*other[modality]))
    found.square().mul(torch.arange(16)).sum().backward()
    assert all(parameter.grad is None for name, parameter in encoder.named_parameters() if unused in name)
    assert set(encoder.group_parameters(0)) == {name for name in both.group_parameters(0) if used in name}
    assert all(parameter.grad is not None for parameter in encoder.group_parameters(0).values())


def test_settings_that_do_not_fit_the_model_are_one_sentence(tiny_dataset, tiny_clip, tmp_path):
    with pytest.raises(PerPEFTError, match="--peft_type c3a: .*block size.*--peft_config FILE") as error:
        run_script(tiny_arguments(tiny_dataset, tiny_clip, tmp_path, "c3a"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content, options, expected", [
    ("no JSON", {}, "cannot be read as JSON"),
    ('{"r": 4}', {}, "names no adapter"),
    ('{"peft_type": "LORA", "colour": 1}', {}, "lora has no setting colour"),
    ('{"peft_type": "ADALORA"}', {}, "adalora cannot be used"),
    ('{"peft_type": "LORA"}', {"peft_type": "ia3"}, "--peft_config is of lora, --peft_type is ia3"),
    ('{"peft_type": "LORA"}', {"rank": 8}, "--rank 8 has no effect"),
    ('{"peft_type": "LORA"}', {"method": "frozen"}, "--peft_config has no effect with --method frozen"),
])  # fmt: skip
def test_wrong_configurations_are_refused(content, options, expected, tiny_dataset, tiny_clip, tmp_path, capsys):
    (tmp_path / "file.json").write_text(content)
    options = {"peft_type": None, "peft_config": tmp_path / "file.json"} | options
    with pytest.raises(SystemExit):
        tiny_options(tiny_dataset, tiny_clip, tmp_path, **options)
    assert expected in " ".join(capsys.readouterr().err.split())


def test_a_run_by_a_saved_adapters_own_file_continues_and_opens_again(tiny_dataset, tiny_clip, tiny_run, tmp_path):
    settings = json.loads((tiny_run.folder / "global" / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "file.json").write_text(json.dumps(settings | {"r": 2, "lora_alpha": 12}))
    options = {"peft_type": None, "peft_config": tmp_path / "file.json", "global_epochs": 1, "num_epochs": 1}
    folder = trained(tiny_dataset, tiny_clip, tmp_path / "runs", **options)
    assert folder.name.startswith("tiny_lora_config_")
    saved = json.loads((folder / "personalized" / "group_2" / "adapter" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (2, 12)
    (tmp_path / "file.json").unlink()  # the run folder has it
    run = open_finished(folder, "cpu", tiny_dataset.train_dir)
    run.load_global()
    assert np.isfinite(run.item_table(0).detach().numpy()).all()
