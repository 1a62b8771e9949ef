"""LoRA and (IA)3 sit where the paper puts them, CLIP stays frozen, and a group's step touches that group alone."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from models import ClipPeftEncoder, MMProjector, PerPEFT, SASRec
from models.peft_configs import ia3_config, lora_config, peft_config
from tests.conftest import adapter_parameters, draw_image, make_trainer
from utils.common.errors import PerPEFTError
from utils.items.preprocessing import read_image
from utils.training.checkpoints import load_adapter, load_weights, save_adapter, save_weights
from utils.training.sampling import Batch

CPU = torch.device("cpu")
TITLES = ["red lamp number 1", "a blue mug", "pale chair", "green clock number 4, very long title indeed, longer than any"]
CONFIGS = {"lora": lora_config, "ia3": ia3_config}


@pytest.fixture(scope="module")
def processors(tiny_clip):
    return AutoImageProcessor.from_pretrained(tiny_clip, use_fast=False), AutoTokenizer.from_pretrained(tiny_clip)


@pytest.fixture(scope="module")
def inputs(processors, tmp_path_factory):
    """Pixels and tokens as the item store returns them, and pixel_values and masked tokens as the real processors do."""
    image_processor, tokenizer = processors
    folder = tmp_path_factory.mktemp("images")
    for item in range(1, 5):
        draw_image(item).save(folder / f"{item}.jpg")
    paths = [folder / f"{item}.jpg" for item in range(1, 5)]
    pixels = torch.from_numpy(np.stack([read_image(path, image_processor) for path in paths]))
    pixel_values = image_processor([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    masked = tokenizer(TITLES, padding=True, truncation=True, max_length=16, return_tensors="pt")
    return {"pixels": pixels, "pixel_values": pixel_values, "tokens": masked["input_ids"], "mask": masked["attention_mask"]}


def make_encoder(tiny_clip, processors, kind="lora", **options):
    return ClipPeftEncoder(CLIPModel.from_pretrained(tiny_clip), CONFIGS[kind](**options), processors[0])


def trainable_names(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def layer_names(config):
    """`vision_model.encoder.layers.0.` and so on, for both towers."""
    towers = (("vision_model", config.vision_config), ("text_model", config.text_config))
    return [f"{tower}.encoder.layers.{i}." for tower, settings in towers for i in range(settings.num_hidden_layers)]


@torch.no_grad()
def shake(parameters, seed=0, size=0.3):
    """Move parameters away from where they start, at which LoRA and (IA)3 change nothing."""
    random = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(size * torch.randn(parameter.shape, generator=random))


@torch.no_grad()
def clip_features(clip, inputs):
    """CLIPModel's own image and title embeddings side by side, through the real processors' inputs."""
    output = clip(input_ids=inputs["tokens"], attention_mask=inputs["mask"], pixel_values=inputs["pixel_values"])
    return torch.cat([output.image_embeds, output.text_embeds], dim=1)


@torch.no_grad()
def encoder_features(encoder, inputs, group=0):
    encoder.eval()
    encoder.use_group(group)
    return encoder(inputs["pixels"], inputs["tokens"])


# ---------------------------------------------------------------- where the adapters sit


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("lora", ["self_attn.q_proj", "self_attn.v_proj"]), ("ia3", ["self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"])],
)
def test_exactly_the_papers_layers_of_both_towers_are_adapted_and_nothing_else_is_trainable(
    tiny_clip, processors, kind, targets
):
    encoder = make_encoder(tiny_clip, processors, kind)
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
def test_parameter_counts_on_vit_b_32_are_those_computed_by_hand(kind, expected, capsys):
    from utils.run.build import trainable_counts

    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig())
    total = sum(parameter.numel() for parameter in clip.parameters())
    assert total == 151_277_313  # openai/clip-vit-base-patch32
    encoder = ClipPeftEncoder(clip, CONFIGS[kind](), CLIPImageProcessor())
    trainable = sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    assert trainable == expected == {"lora": 245_760, "ia3": 46_080}[kind]
    counts = trainable_counts(encoder)
    assert counts["adapter_of_one_group"] == expected and counts["foundation_model"] == total
    assert counts["adapter_share_of_foundation_model"] == pytest.approx(expected / total)
    with capsys.disabled():
        print(f"\n{kind}: {expected:,} of {total:,} parameters, {100 * expected / total:.3f}%")


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_fresh_adapter_computes_clips_own_embeddings(tiny_clip, processors, inputs, kind):
    expected = clip_features(CLIPModel.from_pretrained(tiny_clip).eval(), inputs)
    encoder = make_encoder(tiny_clip, processors, kind)
    assert encoder.feature_dim == expected.shape[1] == 32
    torch.testing.assert_close(encoder_features(encoder, inputs), expected, rtol=0, atol=1e-5)


def test_normalisation_on_the_device_equals_the_processors(tiny_clip, processors, inputs):
    encoder = make_encoder(tiny_clip, processors)
    patches = [module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d)]  # the first layer on images
    seen = []
    patches[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder_features(encoder, inputs)
    assert len(patches) == len(seen) == 1
    torch.testing.assert_close(seen[0], inputs["pixel_values"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_text_padding_after_the_end_of_a_title_does_not_matter(tiny_clip, processors, inputs):
    encoder = make_encoder(tiny_clip, processors).eval()
    shake(adapter_parameters(encoder))
    together = encoder(inputs["pixels"], inputs["tokens"])
    for row, length in enumerate(inputs["mask"].sum(1).tolist()):
        alone = encoder(inputs["pixels"][row : row + 1], inputs["tokens"][row : row + 1, :length])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)


# ---------------------------------------------------------------- groups


def test_cloning_keeps_the_model_in_the_mode_it_is_in(tiny_clip, processors):
    """A fresh adapter in training mode would drop out in the evaluation of a model that was put into eval mode before."""
    encoder = make_encoder(tiny_clip, processors)
    for training in (False, True):
        encoder.train(training)
        encoder.clone_groups(encoder.num_groups + 1)
        assert {module.training for module in encoder.modules()} == {training}


def test_eleven_groups_do_not_mix_up_group_1_and_group_10(tiny_clip, processors):
    encoder = make_encoder(tiny_clip, processors)
    encoder.clone_groups(11)
    parameters = [id(parameter) for group in range(11) for parameter in encoder.group_parameters(group).values()]
    assert len(parameters) == len(set(parameters)) == 11 * 16  # 4 layers, q and v, A and B
    assert len(set(parameters)) == len(trainable_names(encoder))


BATCH = Batch(
    group=1,
    items=np.array([0, 2, 4, 6, 8]),
    seq=np.array([[0, 0, 1, 2], [1, 2, 3, 4]]),
    positives=np.array([[0, 0, 2, 3], [2, 3, 4, 1]]),
    negatives=np.array([[0, 0, 4, 4], [1, 1, 1, 2]]),
    num_transitions=6,
)


def make_model(tiny_clip, processors, kind, groups=3, **options):
    torch.manual_seed(0)
    encoder = make_encoder(tiny_clip, processors, kind, **options)
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
def test_steps_of_one_group_change_its_adapter_its_projector_and_sasrec_alone(tiny_clip, processors, inputs, kind):
    model = make_model(tiny_clip, processors, kind)
    trainer = make_trainer(model, lambda items: (inputs["pixels"], inputs["tokens"]), 1e-2, 0.5, 1e-6)
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


def test_loss_is_the_written_formula(tiny_clip, processors, inputs):
    model = make_model(tiny_clip, processors, "lora").eval()
    trainer = make_trainer(model, lambda items: (inputs["pixels"], inputs["tokens"]), 1e-2, 0.0, 0.01)
    loss = trainer.loss(BATCH).item()
    with torch.no_grad():
        features = encoder_features(model.encoder, inputs, 1)
        vectors = model.projectors[1](torch.cat([torch.zeros(1, 32), features]))
        e = (0.5 * vectors + model.sasrec.item_emb.weight[torch.from_numpy(BATCH.items)]).double()
        states = model.sasrec.states(torch.from_numpy(BATCH.seq), vectors, torch.from_numpy(BATCH.items)).double()
    positive_terms, negative_terms = [], []
    for user in range(2):
        for t in range(4):
            if BATCH.seq[user, t]:
                positive = states[user, t] @ e[BATCH.positives[user, t]]
                negative = states[user, t] @ e[BATCH.negatives[user, t]]
                positive_terms.append(-np.log(1 / (1 + np.exp(-positive))))
                negative_terms.append(-np.log(1 - 1 / (1 + np.exp(-negative))))
    norm = np.sqrt((model.sasrec.item_emb.weight.detach().double().numpy() ** 2).sum())
    assert len(positive_terms) == 6
    assert loss == pytest.approx(np.mean(positive_terms) + np.mean(negative_terms) + 0.01 * norm, rel=1e-4)


def test_step_is_adamw_with_decoupled_weight_decay(tiny_clip, processors, inputs):
    """After one AdamW step a weight is w (1 - lr wd) - lr sign(gradient), for gradients far above epsilon."""
    model = make_model(tiny_clip, processors, "lora").eval()
    trainer = make_trainer(model, lambda items: (inputs["pixels"], inputs["tokens"]), 1e-2, 0.5, 0.0)
    for parameter in (model.projectors[1].projector[3].bias, next(iter(model.encoder.group_parameters(1).values()))):
        loss = trainer.loss(BATCH)
        gradient = torch.autograd.grad(loss, parameter)[0]
        before = parameter.detach().clone()
        state = {k: v.clone() for k, v in model.state_dict().items()}
        fresh = make_trainer(model, lambda items: (inputs["pixels"], inputs["tokens"]), 1e-2, 0.5, 0.0)
        fresh.update(fresh.loss(BATCH))
        clear = gradient.abs() > 1e-5
        assert clear.any()
        expected = before * (1 - 1e-2 * 0.5) - 1e-2 * gradient.sign()
        torch.testing.assert_close(parameter.detach()[clear], expected[clear], rtol=0, atol=2e-5)
        model.load_state_dict(state)


# ---------------------------------------------------------------- saved adapters


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [(("ia3", {}), ("lora", {})), (("lora", {}), ("ia3", {})), (("lora", {"rank": 2}), ("lora", {"rank": 4}))],
)
def test_adapter_of_another_kind_or_rank_is_refused_and_nothing_is_loaded(tiny_clip, processors, saved, loaded, tmp_path):
    other = make_encoder(tiny_clip, processors, saved[0], **saved[1])
    shake(adapter_parameters(other))
    save_adapter(other, tmp_path, 0)
    encoder = make_encoder(tiny_clip, processors, loaded[0], **loaded[1])
    before = [parameter.detach().clone() for parameter in adapter_parameters(encoder)]
    with pytest.raises(ValueError):  # what load_adapter documents
        load_adapter(encoder, tmp_path, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, adapter_parameters(encoder)))


@pytest.mark.parametrize("damage", ["truncated", "no safetensors", "a tensor less", "missing"])
def test_damaged_adapter_is_reported_in_one_sentence(tiny_clip, processors, damage, tmp_path):
    model = make_model(tiny_clip, processors, "lora", groups=1)
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


def test_an_adapter_that_acts_at_another_strength_is_refused(tiny_clip, processors, tmp_path):
    """The shapes of its weights do not show it."""
    save_adapter(make_encoder(tiny_clip, processors, "lora"), tmp_path, 0)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 32}))
    with pytest.raises(ValueError, match="saved with lora_alpha 32, the model has 8"):
        load_adapter(make_encoder(tiny_clip, processors, "lora"), tmp_path, 0)
    path.unlink()  # the weights alone are enough
    load_adapter(make_encoder(tiny_clip, processors, "lora"), tmp_path, 0)


@pytest.mark.parametrize("kind", ["lora", "ia3", "dora", "vera"])
def test_weights_cast_once_change_nothing_of_what_autocast_computes(tiny_clip, processors, inputs, kind):
    found = []
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        clip = CLIPModel.from_pretrained(tiny_clip)
        encoder = ClipPeftEncoder(clip, peft_config(kind, rank=4), processors[0], autocast_dtype=dtype).eval()
        parameters = encoder.group_parameters(0)
        shake(parameters.values())
        with torch.autocast("cpu", torch.bfloat16):
            features = encoder(inputs["pixels"], inputs["tokens"])
        (features.float() ** 2 * torch.arange(features.shape[1])).sum().backward()
        found.append([features.detach(), *(parameter.grad for parameter in parameters.values())])
        types = {parameter.dtype for name, parameter in clip.named_parameters() if name.endswith("out_proj.weight")}
        assert types == {dtype or torch.float32}
        assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert all(torch.equal(plain, cast) for plain, cast in zip(*found, strict=True))
