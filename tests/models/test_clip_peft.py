"""LoRA and (IA)3 sit where the paper puts them, CLIP stays frozen, and a group's step touches that group alone."""
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from models import ClipPeftEncoder, MMProjector, PerPEFT, SASRec
from models.peft_configs import ia3_config, lora_config, peft_config
from tests.conftest import adapter_parameters, make_trainer
from tests.models.conftest import BATCH, features, shake
from tests.run_files import change_json
from utils.common.errors import PerPEFTError
from utils.run.build import trainable_counts
from utils.training.checkpoints import load_adapter, load_weights, save_adapter, save_weights


def layer_names(config):
    """`vision_model.encoder.layers.0.` and so on, for both towers."""
    towers = (("vision_model", config.vision_config), ("text_model", config.text_config))
    return [f"{tower}.encoder.layers.{i}." for tower, settings in towers for i in range(settings.num_hidden_layers)]


# ---------------------------------------------------------------- where the adapters sit


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("lora", ["self_attn.q_proj", "self_attn.v_proj"]), ("ia3", ["self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"])],
)
def test_exactly_the_papers_layers_of_both_towers_are_adapted_and_nothing_else_is_trainable(
    tiny_clip, make_encoder, kind, targets
):
    encoder = make_encoder(kind)
    parts = ["lora_A.weight", "lora_B.weight"] if kind == "lora" else ["ia3_l"]
    layers = layer_names(CLIPConfig.from_pretrained(tiny_clip))
    assert len(layers) == 4
    expected = {f"{layer}{target}.{part}" for layer in layers for target in targets for part in parts}
    found = {name.removeprefix("base_model.model."): p for name, p in encoder.group_parameters(0).items()}
    assert set(found) == expected
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trainable} == {id(parameter) for parameter in found.values()}


def test_adapter_settings_are_the_papers():
    lora, ia3 = lora_config(), ia3_config()
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.bias) == (4, 8, 0.1, "none")
    assert (lora_config(7).r, lora_config(7).lora_alpha) == (7, 14)
    assert set(ia3.feedforward_modules) == {"fc1"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # ViT-B/32: 12 image layers of width 768 and 12 title layers of width 512; rank 4, A and B, two projections a layer
        ("lora", 12 * 2 * 4 * (768 + 768) + 12 * 2 * 4 * (512 + 512)),
        # one factor an output of k_proj and v_proj, and one an input of fc1, which is a feed-forward layer
        ("ia3", 12 * 3 * 768 + 12 * 3 * 512),
    ],
)
def test_parameter_counts_on_vit_b_32_are_those_computed_by_hand(kind, expected):
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig())
    total = sum(parameter.numel() for parameter in clip.parameters())
    assert total == 151_277_313  # openai/clip-vit-base-patch32
    encoder = ClipPeftEncoder(clip, peft_config(kind), CLIPImageProcessor())
    trainable = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    assert trainable == expected == {"lora": 245_760, "ia3": 46_080}[kind]
    counts = trainable_counts(encoder)
    assert counts["adapter_of_one_group"] == expected and counts["foundation_model"] == total
    assert counts["adapter_share_of_foundation_model"] == pytest.approx(expected / total)


# ---------------------------------------------------------------- gradient checkpointing


def test_gradient_checkpointing_has_the_same_gradients_for_less_memory(make_encoder, inputs):
    kept, results = {}, {}
    for checkpointing in (False, True):
        encoder = make_encoder(gradient_checkpointing=checkpointing)
        shake(encoder.group_parameters(0).values(), size=1)
        encoder.clone_groups(2)
        encoder.train()
        torch.manual_seed(5)  # of LoRA's dropout, which the second computation has to repeat
        kept[checkpointing] = []

        def keep(tensor, at=kept[checkpointing]):
            at.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = features(encoder, inputs, 1)
        (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
        gradients = {name: parameter.grad for name, parameter in encoder.group_parameters(1).items()}
        assert all(parameter.grad is None for parameter in encoder.group_parameters(0).values())
        results[checkpointing] = (found.detach(), gradients)
    torch.testing.assert_close(results[True], results[False])
    assert any(gradient.abs().max() > 0 for gradient in results[True][1].values())
    assert sum(kept[True]) < 0.5 * sum(kept[False])


# ---------------------------------------------------------------- groups


def test_cloning_keeps_the_model_in_the_mode_it_is_in(make_encoder):
    """A fresh adapter in training mode would drop out in the evaluation of a model that was put into eval mode before."""
    encoder = make_encoder()
    for training in (False, True):
        encoder.train(training)
        encoder.clone_groups(encoder.num_groups + 1)
        assert {module.training for module in encoder.modules()} == {training}


def test_eleven_groups_do_not_mix_up_group_1_and_group_10(make_encoder):
    encoder = make_encoder()
    encoder.clone_groups(11)
    parameters = [id(parameter) for group in range(11) for parameter in encoder.group_parameters(group).values()]
    assert len(parameters) == len(set(parameters)) == 11 * 16  # 4 layers, q and v, A and B
    assert len(set(parameters)) == sum(parameter.requires_grad for parameter in encoder.parameters())


def make_model(encoder, groups=3):
    shake(adapter_parameters(encoder), size=0.05)  # at its start LoRA's A has no gradient, since B is zero
    model = PerPEFT(encoder, MMProjector(encoder.feature_dim, 8), SASRec(10, 8, maxlen=4, num_heads=2))
    if groups > 1:
        model.clone_groups(groups)
    return model


def snapshot(model, groups=3):
    encoder = model.encoder
    return {
        **{f"adapter {g}": {k: p.detach().clone() for k, p in encoder.group_parameters(g).items()} for g in range(groups)},
        **{f"projector {g}": {k: v.clone() for k, v in model.projectors[g].state_dict().items()} for g in range(groups)},
        "sasrec": {k: v.clone() for k, v in model.sasrec.state_dict().items()},
        "clip": {k: p.detach().clone() for k, p in encoder.named_parameters() if not p.requires_grad},
    }


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_steps_of_one_group_change_its_adapter_its_projector_and_sasrec_alone(make_encoder, inputs, kind):
    model = make_model(make_encoder(kind))
    trainer = make_trainer(model, lambda items: (inputs.pixels, inputs.tokens), 1e-2, 0.5, 1e-6)
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    adapters = {id(p) for p in adapter_parameters(model.encoder)}
    assert optimized == {id(p) for p in model.sasrec.parameters()} | {id(p) for p in model.projectors.parameters()} | adapters

    model.train()
    # group 2 has trained before, so that its optimizer holds a momentum that must not act in group 1's steps
    trainer.update(trainer.loss(replace(BATCH, group=2)))
    before = snapshot(model)
    for _ in range(3):
        trainer.update(trainer.loss(BATCH))
    after = snapshot(model)
    for part, tensors in before.items():
        changed = [name for name, tensor in tensors.items() if not torch.equal(tensor, after[part][name])]
        if part in ("adapter 1", "projector 1"):
            assert len(changed) == len(tensors), f"{part}: unchanged {set(tensors) - set(changed)}"
        elif part == "sasrec":
            assert "item_emb.weight" in changed and "last_layernorm.bias" in changed
        else:
            assert not changed, f"{part} changed: {changed[:3]}"


# ---------------------------------------------------------------- saved adapters


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(("ia3",), ("lora",)), (("lora",), ("ia3",)), (("lora", 2), ("lora", 4))],
)
def test_adapter_of_another_kind_or_rank_is_refused_and_nothing_is_loaded(make_encoder, saved, loaded, tmp_path):
    other = make_encoder(*saved)
    shake(adapter_parameters(other))
    save_adapter(other, tmp_path, 0)
    encoder = make_encoder(*loaded)
    before = [parameter.detach().clone() for parameter in adapter_parameters(encoder)]
    with pytest.raises(ValueError):  # what load_adapter documents
        load_adapter(encoder, tmp_path, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, adapter_parameters(encoder)))


@pytest.mark.parametrize("damage", ["truncated", "no safetensors", "a tensor less", "missing"])
def test_damaged_adapter_is_reported_in_one_sentence(make_encoder, damage, tmp_path):
    model = make_model(make_encoder(), groups=1)
    save_weights(model, tmp_path / "global", "global")
    path = tmp_path / "global" / "adapter" / "adapter_model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "no safetensors":
        path.write_bytes(b"not a safetensors file at all")
    elif damage == "a tensor less":
        weights = load_file(path)
        weights.pop(sorted(weights)[0])
        save_file(weights, path, metadata={"format": "pt"})
    else:
        shutil.rmtree(path.parent)
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
