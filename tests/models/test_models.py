"""SASRec, the projector and IISAN compute what the papers define, re-implemented here in plain operations."""
import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models import IISAN, ItemEncoder, MMProjector, PerPEFT, SASRec
from models.towers import Traits
from tests.conftest import make_trainer
from tests.models.conftest import BATCH, shake

ITEMS, WIDTH, MAXLEN, BLOCKS, HEADS = 12, 8, 5, 2, 2
HISTORIES = [[0, 0, 3, 5, 3], [1, 2, 3, 4, 5], [0, 0, 0, 0, 7], [0, 12, 12, 1, 9]]


def make_sasrec(**changes):
    """A SASRec in eval mode whose biases and norms are not at their initial values, so that forgetting one shows."""
    torch.manual_seed(0)
    model = SASRec(ITEMS, **{"hidden_units": WIDTH, "maxlen": MAXLEN, "num_blocks": BLOCKS, "num_heads": HEADS} | changes).eval()
    shake([parameter for parameter in model.parameters() if parameter.dim() == 1])
    return model


def weights_of(module):
    """By name; a convolution of width 1 as a matrix."""
    return {name: tensor.double().numpy().squeeze() for name, tensor in module.state_dict().items()}


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x, weights, name):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-8) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def plain_attention(query, x, weights, name, heads):
    """Multi-head attention of one history, [time, width] each, position t attending to 0..t, by an explicit softmax."""
    matrices, biases = (np.split(weights[f"{name}.in_proj_{part}"], 3) for part in ("weight", "bias"))
    projected = [source @ matrix.T + bias for source, matrix, bias in zip((query, x, x), matrices, biases)]
    joined = []
    for q, k, v in zip(*(np.split(part, heads, axis=1) for part in projected)):
        shares = np.tril(np.exp(q @ k.T / np.sqrt(q.shape[1])))  # [time, time]
        joined.append(shares / shares.sum(1, keepdims=True) @ v)
    return linear(np.hstack(joined), weights, f"{name}.out_proj")


def plain_states(model, history, item_vectors, heads=HEADS, blocks=BLOCKS, weight_scalar=0.5):
    """The states of one left-padded history (global item numbers) by their definition, from the model's weights alone."""
    weights = weights_of(model)
    table = weight_scalar * item_vectors.double().numpy() + weights["item_emb.weight"]
    positions = [0 if item == 0 else position for position, item in enumerate(history, 1)]
    x = table[history] * np.sqrt(table.shape[1]) + weights["pos_emb.weight"][positions]
    for block in range(blocks):
        q = layer_norm(x, weights, f"attention_layernorms.{block}")
        x = q + plain_attention(q, x, weights, f"attention_layers.{block}", heads)
        x = layer_norm(x, weights, f"forward_layernorms.{block}")
        inner = np.maximum(0, linear(x, weights, f"forward_layers.{block}.conv1"))
        x = x + linear(inner, weights, f"forward_layers.{block}.conv2")
    return layer_norm(x, weights, "last_layernorm")


@pytest.fixture
def vectors():
    return torch.randn(ITEMS + 1, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("histories, heads, blocks, weight_scalar", [
    (HISTORIES, HEADS, BLOCKS, 0.5), ([[0, 4, 9]], 4, 3, 1.7),  # shorter than maxlen: positions count from 1 all the same
])  # fmt: skip
@torch.no_grad()
def test_states_equal_the_written_formula(vectors, histories, heads, blocks, weight_scalar):
    model = make_sasrec(num_heads=heads, num_blocks=blocks, weight_scalar=weight_scalar)
    expected = [plain_states(model, history, vectors, heads, blocks, weight_scalar) for history in histories]
    np.testing.assert_allclose(model.states(torch.tensor(histories), vectors).numpy(), expected, atol=2e-5)


@torch.no_grad()
def test_logits_are_dot_products_of_states_and_item_inputs(vectors):
    model = make_sasrec()
    positives = [[0, 0, 5, 3, 8], [2, 3, 4, 5, 6], [0, 0, 0, 0, 1], [0, 12, 1, 9, 2]]
    negatives = [[0, 0, 1, 1, 2], [7, 8, 9, 7, 8], [0, 0, 0, 0, 3], [0, 3, 4, 5, 6]]
    rows = torch.tensor([HISTORIES, positives, negatives])  # [3, batch, time]
    items, local = rows.unique(return_inverse=True)  # a table of the batch's own items, as in training
    states = np.stack([plain_states(model, history, vectors) for history in HISTORIES])
    e = (0.5 * vectors + model.item_emb.weight).numpy()
    for found in (model(*rows, vectors), model(*local, vectors[items], items)):
        for targets, logits in zip(rows[1:], found):
            np.testing.assert_allclose(logits.numpy(), (states * e[targets]).sum(-1), atol=5e-5)


def test_rows_zero_are_zero_at_first_and_weights_are_xavier_normal():
    torch.manual_seed(0)
    model = SASRec(3000, hidden_units=64, maxlen=50, num_heads=4)
    assert not model.item_emb.weight[0].any() and not model.pos_emb.weight[0].any()
    for name, parameter in [(name, parameter) for name, parameter in model.named_parameters() if parameter.dim() >= 2]:
        fan_out, fan_in = parameter.shape[:2]
        expected = (2 / (fan_in + fan_out)) ** 0.5
        weights = parameter[1:] if name in ("item_emb.weight", "pos_emb.weight") else parameter
        # five standard errors of a standard deviation; normal, so 4.55% lie beyond two deviations
        assert weights.std().item() == pytest.approx(expected, rel=5 / (2 * weights.numel()) ** 0.5), name
        assert abs(weights.mean().item()) < 5 * expected / weights.numel() ** 0.5, name
        assert (weights.abs() > 2 * expected).float().mean().item() == pytest.approx(0.0455, abs=0.02), name
    for norm in (*model.attention_layernorms, *model.forward_layernorms, model.last_layernorm):
        assert norm.eps == 1e-8


def make_model():
    """Its adapter is a linear layer on features that are its input: the interface of encoders, without CLIP."""
    torch.manual_seed(0)
    return PerPEFT(ItemEncoder(nn.Linear(6, 6), 6, 1), MMProjector(6, WIDTH), SASRec(ITEMS, WIDTH, MAXLEN, BLOCKS, HEADS))


def test_rows_zero_stay_zero_in_training(vectors):
    model = make_model().train()
    trainer = make_trainer(model, lambda items: (torch.randn(4, 6),), 1e-2, 0.1, 1e-2)
    before = model.sasrec.item_emb.weight[2].clone()
    for _ in range(5):
        trainer.update(trainer.loss(replace(BATCH, group=0)))
    assert not model.sasrec.item_emb.weight[0].any() and not model.sasrec.pos_emb.weight[0].any()
    assert (model.sasrec.item_emb.weight[2] - before).abs().max() > 1e-3
    model.sasrec.states(torch.tensor(HISTORIES), vectors).square().sum().backward()  # through a full table
    assert not model.sasrec.item_emb.weight.grad[0].any()


def test_state_dict_names_and_shapes_are_those_of_the_authors():
    def shapes(module):
        return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

    expected = {"item_emb.weight": (101, 32), "pos_emb.weight": (11, 32)}
    norms = [f"{norm}.{i}" for norm in ("attention_layernorms", "forward_layernorms") for i in range(2)]
    expected |= {f"{norm}.{part}": (32,) for norm in [*norms, "last_layernorm"] for part in ("weight", "bias")}
    for i in range(2):
        attention = {"in_proj_weight": (96, 32), "in_proj_bias": (96,), "out_proj.weight": (32, 32), "out_proj.bias": (32,)}
        expected |= {f"attention_layers.{i}.{name}": shape for name, shape in attention.items()}
        for n in (1, 2):
            expected |= {f"forward_layers.{i}.conv{n}.weight": (32, 32, 1), f"forward_layers.{i}.conv{n}.bias": (32,)}
    assert shapes(SASRec(100)) == expected
    assert shapes(MMProjector(1024)) == {
        "projector.0.weight": (64, 1024), "projector.0.bias": (64,), "projector.1.weight": (64,), "projector.1.bias": (64,),
        "projector.3.weight": (32, 64), "projector.3.bias": (32,), "last_layernorm.weight": (32,), "last_layernorm.bias": (32,),
    }  # fmt: skip


@pytest.mark.parametrize("module, expected", [
    (SASRec, "num_items, hidden_units=32, maxlen=10, num_blocks=2, num_heads=4, dropout_rate=0.3, weight_scalar=0.5"),
    (MMProjector, "in_dim, hidden_units=32"),
    (IISAN, "image_dim=768, text_dim=512, num_states=7, bottleneck=32, modality='both'"),
])  # fmt: skip
def test_import_surface_has_the_documented_signatures(module, expected):
    parameters = inspect.signature(module).parameters.values()
    assert ", ".join(str(parameter.replace(annotation=parameter.empty)) for parameter in parameters) == expected


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_item_vectors_equal_the_written_formula_and_the_padding_items_is_the_projection_of_an_all_zero_row(training):
    model = make_model().train(training)
    model.clone_groups(2)
    shake([*model.encoder.parameters(), *model.projectors.parameters()])
    features = torch.randn(3, 6)
    for group in (1, 0):
        weights = weights_of(model.projectors[group])
        adapted = linear(features.double().numpy(), weights_of(model.encoder), f"_groups.{group}")
        x = np.concatenate([np.zeros((1, 6)), adapted])
        x = np.maximum(0, layer_norm(linear(x, weights, "projector.0"), weights, "projector.1"))
        expected = layer_norm(linear(x, weights, "projector.3"), weights, "last_layernorm")
        assert np.abs(expected[0]).max() > 0.1  # the zero row before the projector is not a zero row after it
        np.testing.assert_allclose(model.item_vectors(group, (features,)).numpy(), expected, atol=1e-5)


def test_which_token_of_a_title_is_pooled_by_hand():
    tokens, mask = torch.tensor([[4, 5, 8, 5, 8, 0], [4, 8, 5, 0, 0, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    places = {"first": [0, 0], "last": [5, 5], "final": [4, 2], "end": [1, 2], "highest": [2, 1]}
    for kind, expected in places.items():
        assert torch.equal(Traits(kind, end_token=5).pooling(tokens, mask), torch.eye(6)[expected]), kind
    assert torch.equal(Traits("final").pooling(tokens, None), torch.eye(6)[[5, 5]])
    for given, expected in ((mask, mask / torch.tensor([[5], [3]])), (None, torch.full((2, 6), 1 / 6))):
        torch.testing.assert_close(Traits("mean").pooling(tokens, given), expected)


def plain_iisan(weights, image, text):
    """One item's features by the definition, from the authors' state_dict names; image, text [S, width]."""
    w = 1 / (1 + torch.exp(-weights["weight_scalar"]))

    def block(name, z):
        x = linear(z, weights, f"{name}.0")
        return linear(0.5 * x * (1 + torch.erf(x / 2**0.5)), weights, f"{name}.2") + z  # GELU

    z_text = z_image = z_both = None
    for i, (v, t) in enumerate(zip(image, text)):
        c = w[2, i] * t + (1 - w[2, i]) * linear(v, weights, f"CombProj.{i}.0")
        z_text = block(f"TextBlocks.{i}", w[0, i] * z_text + (1 - w[0, i]) * t if i else t)
        z_image = block(f"ImgBlocks.{i}", w[1, i] * z_image + (1 - w[1, i]) * v if i else v)
        z_both = block(f"InterBlocks.{i}", c + z_both if i else c)
    return torch.cat([z_text, z_image, z_both])


@pytest.fixture
def iisan():
    """A small IISAN with random weights under the names and shapes of the authors' code, and states of six items."""
    random = torch.Generator().manual_seed(5)
    shapes = {"weight_scalar": (3, 4)}
    for i in range(4):
        for blocks, width in (("ImgBlocks", 7), ("TextBlocks", 5), ("InterBlocks", 5)):
            shapes |= {f"{blocks}.{i}.0.weight": (3, width), f"{blocks}.{i}.0.bias": (3,)}
            shapes |= {f"{blocks}.{i}.2.weight": (width, 3), f"{blocks}.{i}.2.bias": (width,)}
        shapes |= {f"CombProj.{i}.0.weight": (5, 7), f"CombProj.{i}.0.bias": (5,)}
    weights = {name: 0.5 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    model = IISAN(image_dim=7, text_dim=5, num_states=4, bottleneck=3)
    model.load_state_dict(weights, strict=True)
    image, text = torch.randn(6, 4, 7, generator=random), torch.randn(6, 4, 5, generator=random)
    return SimpleNamespace(model=model, weights=weights, image=image, text=text)


def test_iisan_with_the_authors_weights_equals_the_written_formula_and_learns_by_its_gradient(iisan):
    model, plain = iisan.model, {name: weight.double().requires_grad_() for name, weight in iisan.weights.items()}
    features = model(iisan.image, iisan.text)
    expected = torch.stack([plain_iisan(plain, *item) for item in zip(iisan.image.double(), iisan.text.double())])
    torch.testing.assert_close(features, expected.float(), rtol=1e-4, atol=1e-4)
    direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(6))
    (features * direction).sum().backward()
    (expected * direction.double()).sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, plain[name].grad.float(), rtol=1e-3, atol=1e-3, msg=name)


def test_iisan_starts_with_even_gates_and_nearly_silent_blocks():
    torch.manual_seed(0)
    weights = IISAN().state_dict()
    assert not weights["weight_scalar"].any()
    bound = 768**-0.5  # torch's default for a linear layer of 768 inputs: uniform in +-1/sqrt(768)
    for name, weight in weights.items():
        if "Blocks" in name:
            # six standard errors, the smallest tensors being biases of 32 numbers
            assert weight.std().item() == pytest.approx(1e-4, rel=6 / (2 * weight.numel()) ** 0.5), name
        elif "CombProj" in name:
            assert 0.95 * bound < weight.abs().max().item() <= bound, name


def test_iisan_trains_under_autocast_as_it_does_on_a_gpu(iisan):
    exact = iisan.model(iisan.image, iisan.text).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the same rules of mixed types as CUDA's
        features = iisan.model(iisan.image, iisan.text)
    torch.testing.assert_close(features.float(), exact, rtol=0.1, atol=0.5)
    features.float().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() and parameter.grad.any() for parameter in iisan.model.parameters())


@pytest.mark.parametrize("modality, blocks, stream", [("image", "ImgBlocks", slice(5, 12)), ("text", "TextBlocks", slice(0, 5))])
def test_iisan_of_one_modality_is_that_stream_of_the_whole(iisan, modality, blocks, stream):
    one = IISAN(7, 5, 4, 3, modality=modality)
    one.load_state_dict({name: w for name, w in iisan.weights.items() if name.startswith(("weight_scalar", blocks))})  # strictly
    whole = iisan.model(iisan.image, iisan.text)
    torch.testing.assert_close(one(iisan.image, iisan.text), whole[:, stream])
    assert one.out_dim == stream.stop - stream.start
