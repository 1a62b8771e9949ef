"""SASRec, the projector and IISAN compute what DESIGN.md section 3 writes down, re-implemented here in plain operations."""
import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models import IISAN, ItemEncoder, MMProjector, PerPEFT, SASRec
from tests.conftest import make_trainer
from tests.models.conftest import BATCH, shake

ITEMS, WIDTH, MAXLEN, BLOCKS, HEADS = 12, 8, 5, 2, 2


def make_sasrec(**changes):
    """A SASRec in eval mode whose biases and norms are not at their initial values, so that forgetting one shows."""
    torch.manual_seed(0)
    model = SASRec(ITEMS, **{"hidden_units": WIDTH, "maxlen": MAXLEN, "num_blocks": BLOCKS, "num_heads": HEADS} | changes).eval()
    shake([parameter for parameter in model.parameters() if parameter.dim() == 1])
    return model


def layer_norm(x, weights, name, eps=1e-8):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def plain_attention(query, x, weights, name, heads):
    """Multi-head attention of one history, [time, width] each, position t attending to 0..t; loops and an explicit softmax."""
    time, width = x.shape
    in_weight, in_bias = weights[f"{name}.in_proj_weight"], weights[f"{name}.in_proj_bias"]
    q, k, v = (
        source @ in_weight[part * width : (part + 1) * width].T + in_bias[part * width : (part + 1) * width]
        for part, source in enumerate((query, x, x))
    )
    size = width // heads
    joined = np.zeros_like(x)
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        for t in range(time):
            scores = np.array([q[t, own] @ k[s, own] / np.sqrt(size) for s in range(t + 1)])
            shares = np.exp(scores) / np.exp(scores).sum()
            joined[t, own] = sum(share * v[s, own] for s, share in enumerate(shares))
    return joined @ weights[f"{name}.out_proj.weight"].T + weights[f"{name}.out_proj.bias"]


def plain_states(model, history, item_vectors, heads=HEADS, blocks=BLOCKS, weight_scalar=0.5):
    """The states of one left-padded history (global item numbers) by DESIGN.md, from the model's weights alone."""
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    table = weight_scalar * item_vectors.double().numpy() + weights["item_emb.weight"]
    width = table.shape[1]
    x = np.stack([
        table[item] * np.sqrt(width) + weights["pos_emb.weight"][0 if item == 0 else position]
        for position, item in enumerate(history, 1)
    ])  # fmt: skip
    for block in range(blocks):
        q = layer_norm(x, weights, f"attention_layernorms.{block}")
        x = q + plain_attention(q, x, weights, f"attention_layers.{block}", heads)
        x = layer_norm(x, weights, f"forward_layernorms.{block}")
        name = f"forward_layers.{block}"
        inner = np.maximum(0, x @ weights[f"{name}.conv1.weight"][:, :, 0].T + weights[f"{name}.conv1.bias"])
        x = x + inner @ weights[f"{name}.conv2.weight"][:, :, 0].T + weights[f"{name}.conv2.bias"]
    return layer_norm(x, weights, "last_layernorm")


HISTORIES = [[0, 0, 3, 5, 3], [1, 2, 3, 4, 5], [0, 0, 0, 0, 7], [0, 12, 12, 1, 9]]


@pytest.fixture
def vectors():
    return torch.randn(ITEMS + 1, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("histories", "heads", "blocks", "weight_scalar"),
    [(HISTORIES, HEADS, BLOCKS, 0.5), ([[0, 4, 9]], 4, 3, 1.7)],  # shorter than maxlen: positions count from 1 all the same
)
@torch.no_grad()
def test_states_equal_the_written_formula(vectors, histories, heads, blocks, weight_scalar):
    model = make_sasrec(num_heads=heads, num_blocks=blocks, weight_scalar=weight_scalar)
    expected = [plain_states(model, history, vectors, heads, blocks, weight_scalar) for history in histories]
    np.testing.assert_allclose(model.states(torch.tensor(histories), vectors).numpy(), expected, atol=2e-5)


@torch.no_grad()
def test_logits_are_dot_products_of_states_and_item_inputs(vectors):
    model = make_sasrec()
    seq = torch.tensor(HISTORIES)
    positives = torch.tensor([[0, 0, 5, 3, 8], [2, 3, 4, 5, 6], [0, 0, 0, 0, 1], [0, 12, 1, 9, 2]])
    negatives = torch.tensor([[0, 0, 1, 1, 2], [7, 8, 9, 7, 8], [0, 0, 0, 0, 3], [0, 3, 4, 5, 6]])
    states = np.stack([plain_states(model, history, vectors) for history in HISTORIES])
    e = (0.5 * vectors + model.item_emb.weight).numpy()
    for items, logits in zip((positives, negatives), model(seq, positives, negatives, vectors)):
        np.testing.assert_allclose(logits.numpy(), (states * e[items]).sum(-1), atol=5e-5)


@torch.no_grad()
def test_locally_renumbered_rows_have_the_same_states_as_the_full_table(vectors):
    model = make_sasrec()
    items = torch.tensor([0, 3, 5, 7, 9, 12])
    local = torch.tensor([[0, 0, 1, 2, 1], [0, 4, 3, 5, 2]])
    torch.testing.assert_close(
        model.states(local, vectors[items], items), model.states(items[local], vectors), rtol=0, atol=1e-6
    )


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


class TableEncoder(ItemEncoder):
    """An item encoder whose adapter is a linear layer on features that are its input: the interface, without CLIP."""

    def __init__(self, width=6):
        super().__init__(nn.Linear(width, width), width, 1)

    def forward(self, features):
        return self.active(features)


def make_model():
    return PerPEFT(TableEncoder(), MMProjector(6, WIDTH), SASRec(ITEMS, WIDTH, MAXLEN, BLOCKS, HEADS))


def test_rows_zero_stay_zero_in_training():
    torch.manual_seed(0)
    model = make_model()
    trainer = make_trainer(model, lambda items: (torch.randn(4, 6),), 1e-2, 0.1, 1e-2)
    model.train()
    before = model.sasrec.item_emb.weight[2].clone()
    for _ in range(5):
        trainer.update(trainer.loss(replace(BATCH, group=0)))
    assert not model.sasrec.item_emb.weight[0].any() and not model.sasrec.pos_emb.weight[0].any()
    assert (model.sasrec.item_emb.weight[2] - before).abs().max() > 1e-3


def test_row_zero_gets_no_gradient_through_a_full_table_either(vectors):
    model = make_sasrec()
    model.states(torch.tensor(HISTORIES), vectors).square().sum().backward()
    assert not model.item_emb.weight.grad[0].any()


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_state_dict_names_and_shapes_are_those_of_the_authors():
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


def test_import_surface_has_the_documented_signatures():
    def signature(callable_):
        return [(p.name, p.default) for p in inspect.signature(callable_).parameters.values()]

    required = inspect.Parameter.empty
    assert signature(SASRec) == [
        ("num_items", required), ("hidden_units", 32), ("maxlen", 10), ("num_blocks", 2), ("num_heads", 4),
        ("dropout_rate", 0.3), ("weight_scalar", 0.5),
    ]  # fmt: skip
    assert signature(MMProjector) == [("in_dim", required), ("hidden_units", 32)]
    assert signature(IISAN) == [("image_dim", 768), ("text_dim", 512), ("num_states", 7), ("bottleneck", 32)] + [
        ("modality", "both")  # beyond the documented surface, for the ablations
    ]
    with torch.no_grad():
        assert SASRec(20).states(torch.zeros(3, 10, dtype=torch.long), torch.zeros(21, 32)).shape == (3, 10, 32)
        assert IISAN()(torch.zeros(2, 7, 768), torch.zeros(2, 7, 512)).shape == (2, 1792)


def plain_projector(projector, features):
    weights = {name: tensor.double().numpy() for name, tensor in projector.state_dict().items()}
    x = features.double().numpy() @ weights["projector.0.weight"].T + weights["projector.0.bias"]
    x = np.maximum(0, layer_norm(x, weights, "projector.1"))
    x = x @ weights["projector.3.weight"].T + weights["projector.3.bias"]
    return layer_norm(x, weights, "last_layernorm")


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_item_vectors_equal_the_written_formula_and_the_padding_items_is_the_projection_of_an_all_zero_row(training):
    torch.manual_seed(2)
    model = make_model().train(training)
    encoder, projector = model.encoder, model.projectors[0]
    shake(projector.parameters())
    features = torch.randn(3, 6)
    vectors = model.item_vectors(0, (features,))
    adapted = features @ encoder.active.weight.T + encoder.active.bias
    expected = plain_projector(projector, torch.cat([torch.zeros(1, 6), adapted]))
    assert vectors.shape == (4, WIDTH)
    assert np.abs(expected[0]).max() > 0.1  # the zero row before the projector is not a zero row after it
    np.testing.assert_allclose(vectors.numpy(), expected, atol=1e-5)


def plain_iisan(weights, image, text):
    """One item's features by DESIGN.md section 3, from the authors' state_dict names; image, text [S, width]."""
    w = 1 / (1 + torch.exp(-weights["weight_scalar"]))

    def block(name, z):
        x = weights[f"{name}.0.weight"] @ z + weights[f"{name}.0.bias"]
        inner = 0.5 * x * (1 + torch.erf(x / 2**0.5))  # GELU
        return weights[f"{name}.2.weight"] @ inner + weights[f"{name}.2.bias"] + z

    z_text = z_image = z_both = None
    for i in range(len(image)):
        projected = weights[f"CombProj.{i}.0.weight"] @ image[i] + weights[f"CombProj.{i}.0.bias"]
        c = w[2, i] * text[i] + (1 - w[2, i]) * projected
        z_text = text[0] if i == 0 else w[0, i] * z_text + (1 - w[0, i]) * text[i]
        z_image = image[0] if i == 0 else w[1, i] * z_image + (1 - w[1, i]) * image[i]
        z_both = c if i == 0 else c + z_both
        z_text = block(f"TextBlocks.{i}", z_text)
        z_image = block(f"ImgBlocks.{i}", z_image)
        z_both = block(f"InterBlocks.{i}", z_both)
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

    # one step down the gradient of the same loss, read by the authors' names whatever way the module stores its weights
    direction = torch.randn(features.shape, generator=torch.Generator().manual_seed(6))
    (features * direction).sum().backward()
    (expected * direction.double()).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for name, weight in model.state_dict().items():
        stepped = plain[name] - 0.1 * plain[name].grad
        torch.testing.assert_close(weight, stepped.detach().float(), rtol=1e-3, atol=1e-3, msg=name)


def test_iisan_starts_with_even_gates_and_nearly_silent_blocks():
    torch.manual_seed(0)
    weights = IISAN().state_dict()
    assert not weights["weight_scalar"].any()
    for name, weight in weights.items():
        if "Blocks" in name:
            # six standard errors, the smallest tensors being biases of 32 numbers
            assert weight.std().item() == pytest.approx(1e-4, rel=6 / (2 * weight.numel()) ** 0.5), name
    bound = 768**-0.5  # torch's default for a linear layer of 768 inputs: uniform in +-1/sqrt(768)
    for layer in range(7):
        for part in ("weight", "bias"):
            largest = weights[f"CombProj.{layer}.0.{part}"].abs().max().item()
            assert 0.95 * bound < largest <= bound, (layer, part)


def test_iisan_trains_under_autocast_as_it_does_on_a_gpu(iisan):
    exact = iisan.model(iisan.image, iisan.text).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the same rules of mixed types as CUDA's
        features = iisan.model(iisan.image, iisan.text)
    torch.testing.assert_close(features.float(), exact, rtol=0.1, atol=0.5)
    features.float().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() and parameter.grad.any() for parameter in iisan.model.parameters())


@pytest.mark.parametrize(
    ("modality", "blocks", "stream"), [("image", "ImgBlocks", slice(5, 12)), ("text", "TextBlocks", slice(0, 5))]
)
def test_iisan_of_one_modality_is_that_stream_of_the_whole(iisan, modality, blocks, stream):
    one = IISAN(7, 5, 4, 3, modality=modality)
    one.load_state_dict({name: w for name, w in iisan.weights.items() if name.startswith(("weight_scalar", blocks))})  # strictly
    whole = iisan.model(iisan.image, iisan.text)
    torch.testing.assert_close(one(iisan.image, iisan.text), whole[:, stream])
    assert one.out_dim == stream.stop - stream.start
