"""Every tuner of the installed peft that works on linear layers: one adapter a group, saved as peft opens it."""
import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import CLIPModel

from models.peft_configs import PEFT_TYPES, peft_config
from tests.conftest import adapter_parameters, run_script, tiny_arguments, tiny_options, trained
from tests.models.conftest import features, shake
from tests.plain import clip_features
from utils.common.errors import PerPEFTError
from utils.run.finished import open_finished
from utils.training.checkpoints import load_adapter, save_adapter


def frozen_parts(encoder):
    adapters = {id(parameter) for parameter in adapter_parameters(encoder)}
    tensors = [*encoder.named_parameters(), *encoder.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors if id(tensor) not in adapters}


@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_one_adapter_a_group_moves_alone_and_opens_with_peft(kind, tiny_clip, make_encoder, inputs, tmp_path):
    encoder = make_encoder(kind)
    shake(encoder.group_parameters(0).values(), size=0.1)
    encoder.clone_groups(3)
    with torch.no_grad():
        same = [features(encoder, inputs, group) for group in range(3)]
        alone = encoder(inputs.pixels[:1], inputs.tokens[:1])
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    torch.testing.assert_close(alone, same[2][:1], rtol=0, atol=1e-5)  # whichever items are encoded with it
    listed = [id(parameter) for parameter in adapter_parameters(encoder)]
    assert len(set(listed)) == len(listed) > 0
    assert {id(parameter) for parameter in encoder.parameters() if parameter.requires_grad} == set(listed)

    # a step with group 1's features moves its adapter and nothing else
    optimizer = torch.optim.AdamW(adapter_parameters(encoder), lr=1e-2, weight_decay=0.5)
    before = [{name: p.detach().clone() for name, p in encoder.group_parameters(group).items()} for group in range(3)]
    frozen = frozen_parts(encoder)
    features(encoder, inputs, 1)[:, 0].sum().backward()
    optimizer.step()
    moved = [{n for n, p in encoder.group_parameters(g).items() if not torch.equal(p, before[g][n])} for g in range(3)]
    assert moved == [set(), set(before[1]), set()]
    encoder.use_group(0)  # a shared name in the module tree is group 0's again
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in frozen_parts(encoder).items())

    # three adapters on disk, each as its group acts
    for group in range(3):
        shake(encoder.group_parameters(group).values(), group + 1, 0.1)
        save_adapter(encoder, tmp_path / str(group), group)
    with torch.no_grad():
        own = [features(encoder, inputs, group) for group in range(3)]
        assert (own[0] - own[1]).abs().max() > 1e-4
        config = json.loads((tmp_path / "0" / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tiny_clip)
        for group in range(3):
            opened = PeftModel.from_pretrained(CLIPModel.from_pretrained(tiny_clip), tmp_path / str(group) / "adapter")
            torch.testing.assert_close(clip_features(opened, inputs.of_clip), own[group], rtol=0, atol=1e-5)
        other = make_encoder(kind)
        other.clone_groups(3)
        for group in range(3):
            load_adapter(other, tmp_path / str(2 - group), group)
        assert all(parameter.requires_grad for parameter in adapter_parameters(other))  # loading freezes nothing
        for group in range(3):
            torch.testing.assert_close(features(other, inputs, group), own[2 - group], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "ia3", "dora", "vera", "oft"])
@pytest.mark.parametrize(
    ("modality", "used", "unused"), [("text", "text_model", "vision_model"), ("image", "vision_model", "text_model")]
)
def test_one_modality_leaves_the_other_tower_without_adapters_and_gradients(kind, modality, used, unused, make_encoder, inputs):
    encoder, both = make_encoder(kind, modality=modality), make_encoder(kind)
    found = features(encoder, inputs)
    half = slice(0, 16) if modality == "image" else slice(16, 32)
    assert found.shape[1] == encoder.feature_dim == 16
    torch.testing.assert_close(found, features(both, inputs)[:, half])  # fresh adapters change nothing
    pixels, tokens = inputs.pixels, inputs.tokens
    other = encoder(torch.zeros_like(pixels), tokens) if modality == "text" else encoder(pixels, tokens.flip(0))
    assert torch.equal(found, other)
    found.square().mul(torch.arange(16)).sum().backward()
    assert all(parameter.grad is None for name, parameter in encoder.named_parameters() if unused in name)
    assert set(encoder.group_parameters(0)) == {name for name in both.group_parameters(0) if used in name}
    assert all(parameter.grad is not None for parameter in encoder.group_parameters(0).values())


def test_the_order_of_parameters_does_not_depend_on_the_active_group(make_encoder):
    """The state that training continues from lists them in order."""
    encoder = make_encoder()
    encoder.clone_groups(3)
    expected = [id(parameter) for parameter in encoder.parameters() if parameter.requires_grad]
    for group in (1, 2, 0):
        encoder.use_group(group)
        assert [id(parameter) for parameter in encoder.parameters() if parameter.requires_grad] == expected


def test_dora_is_lora_with_magnitudes_by_the_papers_settings(make_encoder):
    config = peft_config("dora", rank=2)
    assert (config.r, config.lora_alpha, config.use_dora, set(config.target_modules)) == (2, 4, True, {"q_proj", "v_proj"})
    names = make_encoder("dora").group_state(0)
    assert {name.split("q_proj.")[1] for name in names if "q_proj" in name} == {
        "lora_A.weight", "lora_B.weight", "lora_magnitude_vector",
    }  # fmt: skip


def test_settings_that_do_not_fit_the_model_are_one_sentence(tiny_dataset, tiny_clip, tmp_path):
    with pytest.raises(PerPEFTError, match="--peft_type c3a: .*block size.*--peft_config FILE") as error:
        run_script(tiny_arguments(tiny_dataset, tiny_clip, tmp_path, "c3a"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ("no JSON", {}, "cannot be read as JSON"),
        ('{"r": 4}', {}, "names no adapter"),
        ('{"peft_type": "LORA", "colour": 1}', {}, "lora has no setting colour"),
        ('{"peft_type": "ADALORA"}', {}, "adalora cannot be used"),
        ('{"peft_type": "LORA"}', {"peft_type": "ia3"}, "--peft_config is of lora, --peft_type is ia3"),
        ('{"peft_type": "LORA"}', {"rank": 8}, "--rank 8 has no effect"),
        ('{"peft_type": "LORA"}', {"method": "frozen"}, "--peft_config has no effect with --method frozen"),
    ],
)
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
