"""Foundation models of every kind, with random weights: features and states are transformers' own; parts that do not fit."""
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from tests.items.families import AVAILABLE, FAMILIES, PAIRS, TOWER, encoder_of, save_model, save_tokenizer
from tests.run_files import change_json
from utils.common.errors import PerPEFTError
from utils.items.foundation import load_foundation
from utils.items.hidden_states import state_shapes
from utils.items.model_files import known_model

CPU = torch.device("cpu")
POOLING_PATCHES = {"siglip", "groupvit", "aimv2", "siglip + bert (mean)"}  # the others pool the class token
POOLING_WORDS = {"tipsv2", *PAIRS} - {"vit + bert (cls)"}  # the others pool a title's first token or its last
FIRST, LAST, ALL = [0], [-1], slice(None)


def own_inputs(family, foundation, title, path):
    """One item's inputs as transformers prepares them: SigLIP's processor pads titles, and reads them without a mask."""
    padding = {"padding": "max_length", "return_attention_mask": False} if family == "siglip" else {}
    options = {"truncation": True, "max_length": 16, "return_tensors": "pt", "return_token_type_ids": False, **padding}
    with Image.open(path) as image:
        pixels = foundation.image_processor(image.convert("RGB"), return_tensors="pt")
    return {"image": pixels, "text": foundation.tokenizer([title], **options)}


def own_towers(family, name):
    """Both towers as transformers loads them, and the model that they are of; a pair's are of none."""
    if family in PAIRS:
        image, text = (AutoModel.from_pretrained(folder).eval() for folder in (name.image_model, name.text_model))
        return {"image": image, "text": text}, None
    plain = AutoModel.from_pretrained(name, attn_implementation="eager").eval()
    return {"image": plain.image_model if family == "flava" else plain.vision_model, "text": plain.text_model}, plain


def embedding(found):
    found = found if isinstance(found, torch.Tensor) else found.pooler_output
    return F.normalize(found[:, 0] if found.dim() == 3 else found, dim=-1)[0]


@torch.no_grad()
@pytest.mark.parametrize("family", [*AVAILABLE, *PAIRS])
def test_features_and_states_are_transformers_own_of_single_items(family, models, dataset):
    name = models(family)
    foundation = load_foundation(name)
    store = foundation.store(dataset)
    without_images = family == "align"
    if without_images:
        with pytest.raises(PerPEFTError, match=r"hidden states of its image tower have several widths \(8, 16\)"):
            foundation.hidden_states(store, CPU)
    states = dict(zip(("image", "text"), foundation.hidden_states(store, CPU, "text" if without_images else "both")))
    alone, shapes = foundation.hidden_states(store, CPU, "text")[1], state_shapes(known_model(name))
    assert without_images or {tuple(found.shape[1:]) for found in (alone, states["text"])} == shapes["text"]
    assert without_images or tuple(states["image"].shape[1:]) in shapes["image"]
    encoder = encoder_of(foundation)
    order = store.reading_order()
    features = encoder(*store.fetch(order, CPU))[order.argsort()]  # titles of several lengths in one batch
    assert features.shape[1] == encoder.feature_dim
    by_last = family in FAMILIES and FAMILIES[family][1] in ("clip", "siglip")
    pooled_words = ALL if family in POOLING_WORDS else LAST if by_last else FIRST
    places = {"image": ALL if family in POOLING_PATCHES else FIRST, "text": pooled_words}
    towers, plain = own_towers(family, name)
    for row in (0, 4, 5, 17):  # the fifth has no title, the sixth's is too long
        expected = []
        for part, inputs in own_inputs(family, foundation, dataset.titles[row], dataset.image_paths[row]).items():
            read = towers[part](**inputs, output_hidden_states=True)
            pooled = read.last_hidden_state[:, places[part]].mean(1)
            expected.append(embedding(getattr(plain, f"get_{part}_features")(**inputs) if plain else pooled))
            if part == "text" or not without_images:
                layers = read.hidden_states[:: (len(read.hidden_states) - 1) // 2]  # of four layers, every second
                own = torch.stack([layer[0, places[part]].mean(0) for layer in layers])
                torch.testing.assert_close(states[part][row], own, rtol=0, atol=1e-5)
        torch.testing.assert_close(features[row], torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", [*AVAILABLE, "dinov2 + distilbert (mean)"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapters_sit_on_the_same_layers_of_both_towers_and_all_train(family, kind, models, dataset):
    """Attention's projections, and with (IA)3 the first feed-forward layer, of two layers a tower, or four."""
    foundation = load_foundation(models(family))
    store = foundation.store(dataset)
    encoder = encoder_of(foundation, kind, gradient_checkpointing=family == "siglip")
    encoder.clone_groups(2)
    encoder.use_group(1)
    frozen = {name: tensor.clone() for name, tensor in foundation.clip.state_dict().items() if "lora_" not in name}
    encoder.train()(*store.fetch(store.reading_order()[:4], CPU)).pow(2)[:, 0].sum().backward()
    for name, tensor in frozen.items():  # among them statistics of batch norms
        assert torch.equal(foundation.clip.state_dict()[name], tensor)
    names = {name for name, parameter in encoder.group_parameters(1).items() if parameter.grad is not None}
    assert names == set(encoder.group_parameters(1))
    assert encoder.unadapted == (["image"] if family == "align" else [])
    # SigLIP and GroupViT pool by layers of their own
    inside = [name for name in names if "vision_model.head" not in name and "downsample" not in name]
    layers = {name.partition(".lora_")[0].partition(".ia3_")[0] for name in inside}
    of_titles = [name for name in layers if ".text_model." in name]
    each = 2 if kind == "lora" else 3
    assert len(of_titles) == (4 if family in PAIRS else 2) * each
    depth = {"align": 0, "larger clip": 4}.get(family, 2)
    fused = family == "blip"  # query, key and value in one
    assert len(layers) - len(of_titles) == depth * (each - fused)


@pytest.fixture
def clip(tiny_clip, tmp_path):
    return shutil.copytree(tiny_clip, tmp_path / "clip")


def larger_vocabulary(clip):
    tokenizer = AutoTokenizer.from_pretrained(clip)
    tokenizer.add_tokens([f"word{number}" for number in range(3)])
    tokenizer.save_pretrained(clip)


def tower_that_needs_more_than_an_image(clip):
    if not hasattr(transformers, "Siglip2Model"):
        pytest.skip("SigLIP 2 of any resolution came with transformers 4.50")
    text = {"vocab_size": 600, "max_position_embeddings": 16, "projection_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**TOWER, "patch_size": 16, "num_patches": 4}
    save_model("Siglip2", clip, {"text_config": TOWER | text, "vision_config": vision})


def settings(file, **changes):
    """Changes a model's settings, in config.json those of its text tower."""
    return lambda clip: change_json(clip / file, lambda content: content.get("text_config", content).update(changes))


PROCESSOR, UNFIT = "preprocessor_config.json", "does not fit its model: .*"
SMALL_CROP = {"crop_size": {"height": 24, "width": 24}, "size": {"shortest_edge": 24}}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (settings(PROCESSOR, do_center_crop=False), "cannot be used: .*makes images of several sizes; set do_center_crop"),
        (settings(PROCESSOR, **SMALL_CROP), "cannot be used: .*images of 24 x 24 pixels, its image tower takes 32 x 32"),
        (larger_vocabulary, r"tokens up to number \d+, its text tower \d+ token embeddings"),
        (settings("config.json", eos_token_id=49407), UNFIT + "; eos_token_id is 49407 in config.json"),
        (settings("config.json", eos_token_id=5), UNFIT + "; eos_token_id is 5 in config.json"),
        (lambda clip: save_tokenizer("siglip", clip), UNFIT + "it ends a title by token"),
        (tower_that_needs_more_than_an_image, "cannot be used: "),
    ],
)
def test_parts_that_do_not_fit_are_one_sentence(damage, expected, clip):
    damage(clip)
    with pytest.raises(PerPEFTError, match=expected) as error:
        load_foundation(str(clip))
    assert "\n" not in str(error.value)


def test_a_clip_as_transformers_5_saves_it_and_without_a_padding_token_is_read_alike(clip, tiny_clip, dataset):
    """That writes processor_config.json and no preprocessor_config.json."""
    settings = json.loads((clip / "preprocessor_config.json").read_text())
    (clip / "preprocessor_config.json").unlink()
    content = {"image_processor": settings | {"image_processor_type": "CLIPImageProcessorFast"}}
    (clip / "processor_config.json").write_text(json.dumps(content))
    for path in (clip / "special_tokens_map.json", clip / "tokenizer_config.json"):
        if path.is_file():
            change_json(path, lambda content: content.update(pad_token=None))
    found, expected = (load_foundation(str(folder)) for folder in (clip, tiny_clip))
    assert type(found.image_processor) is type(expected.image_processor)
    assert found.image_processor.to_dict() == expected.image_processor.to_dict()
    assert found.tokenizer.pad_token is None  # the tiny CLIP pads by its end-of-text token
    assert np.array_equal(found.store(dataset).tokens, expected.store(dataset).tokens)
