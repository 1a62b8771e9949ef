"""LoRA and (IA)3 sit where the paper puts them, CLIP stays frozen, and a group's step touches that group alone."""
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save
from torch.autograd.graph import saved_tensors_hooks
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from models import ClipPeftEncoder, MMProjector, PerPEFT, SASRec
from models.peft_configs import PEFT_TYPES, peft_config
from tests.conftest import adapter_parameters, make_trainer
from tests.models.conftest import BATCH, features, shake
from tests.run_files import change_json
from utils.common.errors import PerPEFTError
from utils.run.build import trainable_counts
from utils.training.checkpoints import load_adapter, load_weights, save_adapter, save_weights


@pytest.mark.parametrize("kind, targets, parts", [
    ("lora", ["self_attn.q_proj", "self_attn.v_proj"], ["lora_A.weight", "lora_B.weight"]),
    ("ia3", ["self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"], ["ia3_l"]),
    ("dora", ["self_attn.q_proj", "self_attn.v_proj"], ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"]),
])  # fmt: skip
def test_exactly_the_papers_layers_of_both_towers_are_adapted(make_encoder, kind, targets, parts):
    layers = [f"base_model.model.{tower}.encoder.layers.{i}." for tower in ("vision_model", "text_model") for i in range(2)]
    expected = {f"{layer}{target}.{part}" for layer in layers for target in targets for part in parts}
    assert set(make_encoder(kind).group_parameters(0)) == expected


def test_adapter_settings_are_the_papers():
    lora, dora = peft_config("lora"), peft_config("dora", rank=7)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.bias, lora.use_dora) == (4, 8, 0.1, "none", False)
    assert (dora.r, dora.lora_alpha, dora.use_dora) == (7, 14, True)


@pytest.mark.parametrize("excluded", [["layers.0.self_attn.q_proj"], r".*\.layers\.0\..*q_proj"])
def test_layers_that_the_settings_exclude_stay_so_with_one_modality(excluded, tiny_clip):
    config = peft_config("lora", settings={"exclude_modules": excluded})
    encoder = ClipPeftEncoder(CLIPModel.from_pretrained(tiny_clip), config, None, modality="text")
    adapted = {name.split(".lora")[0] for name in encoder.group_parameters(0)}
    layers = "base_model.model.text_model.encoder.layers"
    assert adapted == {f"{layers}.{name}" for name in ("0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj")}


@pytest.mark.parametrize("kind, expected", [
    # ViT-B/32: 12 image layers of width 768 and 12 title layers of width 512; rank 4, A and B, two projections a layer
    ("lora", 12 * 2 * 4 * (768 + 768) + 12 * 2 * 4 * (512 + 512)),
    # one factor an output of k_proj and v_proj, and one an input of fc1, which is a feed-forward layer
    ("ia3", 12 * 3 * 768 + 12 * 3 * 512),
])  # fmt: skip
def test_parameter_counts_on_vit_b_32_are_those_computed_by_hand(kind, expected):
    with torch.device("meta"):
        encoder = ClipPeftEncoder(CLIPModel(CLIPConfig()), peft_config(kind), CLIPImageProcessor())
    assert sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad) == expected
    counts, total = trainable_counts(encoder), 151_277_313  # openai/clip-vit-base-patch32
    assert counts["adapter_of_one_group"] == expected and counts["foundation_model"] == total
    assert counts["adapter_share_of_foundation_model"] == pytest.approx(expected / total)


def test_gradient_checkpointing_has_the_same_gradients_for_less_memory(make_encoder, inputs):
    def trained(checkpointing):
        encoder, kept = make_encoder(gradient_checkpointing=checkpointing).train(), []
        shake(encoder.group_parameters(0).values(), size=1)
        torch.manual_seed(5)  # of LoRA's dropout, which the second computation has to repeat
        with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
            found = features(encoder, inputs)
        (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
        return [found.detach(), *(parameter.grad for parameter in adapter_parameters(encoder))], sum(kept)

    (plain, plain_memory), (found, memory) = trained(False), trained(True)
    torch.testing.assert_close(found, plain)
    assert all(gradient.any() for gradient in found[1:])
    assert memory < 0.5 * plain_memory


def make_model(encoder):
    shake(adapter_parameters(encoder), size=0.05)  # at its start LoRA's A has no gradient, since B is zero
    return PerPEFT(encoder, MMProjector(encoder.feature_dim, 8), SASRec(10, 8, maxlen=4, num_heads=2))


def snapshot(model):
    """All parameters, and the buffers, among them what all groups of a tuner such as VeRA share."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("kind", PEFT_TYPES)
def test_steps_of_one_group_change_its_adapter_its_projector_and_sasrec_alone(make_encoder, inputs, kind):
    model = make_model(make_encoder(kind)).train()
    model.clone_groups(3)
    assert all(module.training for module in model.modules())
    trainer = make_trainer(model, lambda items: (inputs.pixels, inputs.tokens), 1e-2, 0.5, 1e-6)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    trained = (*model.sasrec.parameters(), *model.projectors.parameters(), *adapter_parameters(model.encoder))
    assert optimized == {id(parameter) for parameter in trained}
    # group 2 has trained before, so that its optimizer holds a momentum that must not act in group 1's steps
    trainer.update(trainer.loss(replace(BATCH, group=2)))
    before = snapshot(model)
    for _ in range(3):
        trainer.update(trainer.loss(BATCH))
    after = snapshot(model)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    own = {name for name in before if name.startswith(("encoder._groups.1.", "projectors.1."))}
    assert own <= changed
    assert {name.split(".")[0] for name in changed - own} == {"sasrec"}
    assert {"sasrec.item_emb.weight", "sasrec.last_layernorm.bias"} <= changed


@pytest.mark.parametrize(("saved", "loaded"), [(("ia3",), ("lora",)), (("lora",), ("ia3",)), (("lora", 2), ("lora", 4))])
def test_adapter_of_another_kind_or_rank_is_refused_and_nothing_is_loaded(make_encoder, saved, loaded, tmp_path):
    other = make_encoder(*saved)
    shake(adapter_parameters(other))
    save_adapter(other, tmp_path, 0)
    encoder = make_encoder(*loaded)
    before = [parameter.detach().clone() for parameter in adapter_parameters(encoder)]
    with pytest.raises(ValueError):  # what load_adapter documents
        load_adapter(encoder, tmp_path, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, adapter_parameters(encoder)))


def test_damaged_adapter_is_reported_in_one_sentence(make_encoder, tmp_path):
    model = make_model(make_encoder())
    save_weights(model, tmp_path / "global", "global")
    path = tmp_path / "global" / "adapter" / "adapter_model.safetensors"
    whole, a_tensor_less = path.read_bytes(), save(dict(list(load_file(path).items())[1:]), {"format": "pt"})
    for content in (whole[:-100], b"not a safetensors file at all", a_tensor_less, None):
        if content is None:
            shutil.rmtree(path.parent)
        else:
            path.write_bytes(content)
        with pytest.raises(PerPEFTError, match="global"):
            load_weights(model, tmp_path / "global", "global")


def test_an_adapter_that_acts_at_another_strength_is_refused(make_encoder, tmp_path):
    """The shapes of its weights do not show it."""
    save_adapter(make_encoder(), tmp_path, 0)
    path = tmp_path / "adapter" / "adapter_config.json"
    change_json(path, lambda config: config.update(lora_alpha=32))
    with pytest.raises(ValueError, match="saved with lora_alpha 32, the model has 8"):
        load_adapter(make_encoder(), tmp_path, 0)
    path.unlink()  # the weights alone are enough
    load_adapter(make_encoder(), tmp_path, 0)


@pytest.mark.parametrize("kind", ["lora", "ia3", "dora", "vera"])
def test_weights_cast_once_change_nothing_of_what_autocast_computes(make_encoder, inputs, kind):
    found = []
    for dtype in (None, torch.bfloat16):
        encoder = make_encoder(kind, autocast_dtype=dtype)
        parameters = encoder.group_parameters(0)
        shake(parameters.values())
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder(inputs.pixels, inputs.tokens)
        (features.float() ** 2 * torch.arange(features.shape[1])).sum().backward()
        found.append([features.detach(), *(parameter.grad for parameter in parameters.values())])
        types = {parameter.dtype for name, parameter in encoder.named_parameters() if name.endswith("out_proj.weight")}
        assert types == {dtype or torch.float32}
        assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert all(torch.equal(plain, cast) for plain, cast in zip(*found, strict=True))
