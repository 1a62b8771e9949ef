"""Dual encoders of every kind, with random weights: features and states are transformers' own; parts that do not fit."""
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast, ViTConfig, ViTImageProcessor, ViTModel

from models.clip_peft import ClipPeftEncoder
from models.peft_configs import peft_config
from models.towers import layers_of
from tests.conftest import save_tiny_clip, tiny_titles
from tests.items.families import RESIZED, SMALL, TOWER, available_families, seeded
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.items.foundation import known_model, load_foundation
from utils.items.hidden_states import state_shapes

CPU = torch.device("cpu")
BY_CLASS_TOKEN = {
    "clip", "chinese_clip", "altclip", "blip", "clipseg", "flava", "owlvit", "owlv2", "vision-text-dual-encoder", "metaclip_2",
    "tipsv2",
}  # fmt: skip
BY_END_OF_TEXT = {"clip", "clipseg", "groupvit", "owlvit", "owlv2", "metaclip_2", "aimv2"}  # otherwise the first token


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the families' small models, made when they are first asked for."""
    made = {}

    def folder_of(name):
        if name not in made:
            made[name] = seeded(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder_of


@pytest.fixture(scope="module")
def dataset(tiny_dataset):
    """The tiny data set, read."""
    return read_dataset(tiny_dataset.train_dir, tiny_dataset.name)


def encoder_of(foundation, kind="lora", **options):
    config = peft_config(kind, layers=layers_of(foundation.clip))
    return ClipPeftEncoder(foundation.clip, config, foundation.image_processor, traits=foundation.traits, **options).eval()


def own_inputs(family, folder, processor, title, path):
    """One item's inputs as transformers prepares them: SigLIP's processor pads titles, and reads them without a mask."""
    padding = "max_length" if family == "siglip" else False
    tokens = AutoTokenizer.from_pretrained(folder)([title], padding=padding, truncation=True, max_length=16, return_tensors="pt")
    with Image.open(path) as image:
        pixels = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    masked = {} if padding else {"attention_mask": tokens["attention_mask"]}
    return {"input_ids": tokens["input_ids"], **masked}, {"pixel_values": pixels}


def embedding(found):
    found = found if isinstance(found, torch.Tensor) else found.pooler_output
    return F.normalize(found[:, 0] if found.dim() == 3 else found, dim=-1)[0]


@torch.no_grad()
@pytest.mark.parametrize("family", available_families())
def test_features_and_states_are_transformers_own_of_single_items(family, folders, dataset):
    folder = folders(family)
    foundation = load_foundation(str(folder))
    store = foundation.store(dataset)
    if family == "align":
        with pytest.raises(PerPEFTError, match=r"hidden states of its image tower have several widths \(8, 16\)"):
            foundation.hidden_states(store, CPU)
        states = foundation.hidden_states(store, CPU, "text")
    else:
        states = foundation.hidden_states(store, CPU)
        assert all(tuple(found.shape[1:]) in state_shapes(known_model(str(folder)))[part] for part, found in
                   zip(("image", "text"), states))  # fmt: skip
    encoder = encoder_of(foundation)
    order = store.reading_order()
    features = encoder(*store.fetch(order, CPU))[order.argsort()]  # titles of several lengths in one batch
    plain = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    image_tower = plain.image_model if family == "flava" else plain.vision_model
    for row in (0, 4, 5, 17):  # the fifth has no title, the sixth's is too long
        text, image = own_inputs(family, folder, foundation.image_processor, dataset.titles[row], dataset.image_paths[row])
        expected = torch.cat([embedding(plain.get_image_features(**image)), embedding(plain.get_text_features(**text))])
        torch.testing.assert_close(features[row], expected, rtol=0, atol=1e-5)
        words = plain.text_model(**text, output_hidden_states=True).hidden_states
        place = slice(None) if family == "tipsv2" else [-1 if family in BY_END_OF_TEXT | {"siglip"} else 0]
        for state, layer in enumerate((0, 1, 2)):
            torch.testing.assert_close(states[1][row, state], words[layer][0, place].mean(0), rtol=0, atol=1e-5)
            if family != "align":
                patches = image_tower(**image, output_hidden_states=True).hidden_states[layer][0]
                own = patches[0] if family in BY_CLASS_TOKEN else patches.mean(0)
                torch.testing.assert_close(states[0][row, state], own, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", available_families())
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapters_sit_on_the_same_layers_of_both_towers_and_all_train(family, kind, folders, dataset):
    """Attention's projections, and with (IA)3 the first feed-forward layer, of two layers a tower."""
    foundation = load_foundation(str(folders(family)))
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
    assert encoder.bare == (["image"] if family == "align" else [])
    # SigLIP and GroupViT pool by layers of their own
    inside = [name for name in names if "vision_model.head" not in name and "downsample" not in name]
    layers = {name.partition(".lora_")[0].partition(".ia3_")[0] for name in inside}
    of_titles = [name for name in layers if ".text_model." in name]
    assert len(of_titles) == 2 * (2 if kind == "lora" else 3)
    fused = family == "blip"
    assert len(layers) - len(of_titles) == (0 if family == "align" else 2 * ((2 if kind == "lora" else 3) - fused))


# ---------------------------------------------------------------- what is no dual encoder, or does not fit together


def test_a_model_of_another_kind_is_refused_in_a_sentence(tmp_path):
    ViTModel(ViTConfig(**TOWER, **SMALL)).save_pretrained(tmp_path)
    with pytest.raises(PerPEFTError, match="of the kind 'vit', which does not fit.*no get_image_features or get_text") as error:
        load_foundation(str(tmp_path))
    assert "\n" not in str(error.value)


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture
def clip(tiny_clip, tmp_path):
    """A copy of the tiny CLIP, to be damaged."""
    return shutil.copytree(tiny_clip, tmp_path / "clip")


def test_a_processor_without_a_crop_is_read(clip, dataset):
    ViTImageProcessor(**RESIZED).save_pretrained(clip)
    store = load_foundation(str(clip)).store(dataset)
    assert store.pixels.shape == (30, 3, 32, 32)


def test_a_tokenizer_without_a_padding_token_is_read_with_the_same_features(clip, tiny_clip, dataset):
    tokenizer = AutoTokenizer.from_pretrained(clip)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(clip)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (clip / name).is_file():
            change(clip / name, pad_token=None)
    foundation = load_foundation(str(clip))
    store, expected = foundation.store(dataset), load_foundation(str(tiny_clip)).store(dataset)
    assert np.array_equal(store.tokens, expected.tokens)  # the tiny CLIP pads by its end-of-text token


@pytest.mark.parametrize(
    ("file", "settings", "expected"),
    [
        ("preprocessor_config.json", {"do_center_crop": False}, "makes images of several sizes; set do_center_crop"),
        (
            "preprocessor_config.json", {"crop_size": {"height": 24, "width": 24}, "size": {"shortest_edge": 24}},
            "images of 24 x 24 pixels, its image tower takes 32 x 32",
        ),
    ],
)  # fmt: skip
def test_image_processors_that_do_not_fit_are_one_sentence(file, settings, expected, clip):
    change(clip / file, **settings)
    with pytest.raises(PerPEFTError, match=f"cannot be used: .*{expected}") as error:
        load_foundation(str(clip))
    assert "\n" not in str(error.value)


def test_a_larger_vocabulary_than_the_text_towers_is_one_sentence(clip):
    tokenizer = AutoTokenizer.from_pretrained(clip)
    tokenizer.add_tokens([f"word{number}" for number in range(3)])
    tokenizer.save_pretrained(clip)
    with pytest.raises(PerPEFTError, match=r"tokens up to number \d+, its text tower \d+ token embeddings"):
        load_foundation(str(clip))


@pytest.mark.parametrize("end", [49407, 5])
def test_a_pooled_token_that_the_tokenizer_does_not_write_is_one_sentence(end, clip):
    config = json.loads((clip / "config.json").read_text())
    config["text_config"]["eos_token_id"] = end
    (clip / "config.json").write_text(json.dumps(config))
    with pytest.raises(PerPEFTError, match=f"does not fit its model: .*; eos_token_id is {end} in config.json") as error:
        load_foundation(str(clip))
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_ends_no_title_is_one_sentence(clip):
    own = AutoTokenizer.from_pretrained(clip)
    content = json.loads(own.backend_tokenizer.to_str()) | {"post_processor": None}
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token=own.eos_token)
    (clip / "tokenizer_config.json").unlink()
    bare.save_pretrained(clip)
    with pytest.raises(PerPEFTError, match="does not fit its model: it ends a title by token"):
        load_foundation(str(clip))


def test_special_tokens_within_titles_do_not_move_the_pooled_place(tiny_clip):
    """CLIP pools the first end of text, whatever follows it."""
    foundation = load_foundation(str(tiny_clip))
    titles = ["<|endoftext|> mug", "red <|endoftext|> lamp <|startoftext|>", "red lamp"]
    tokens = foundation.tokenizer(titles, padding=True, return_tensors="pt")["input_ids"]
    places = foundation.traits.pooling(tokens, None).argmax(1)
    with torch.no_grad():
        output = foundation.clip.text_model(input_ids=tokens)
    rows = torch.arange(3)
    assert torch.equal(output.last_hidden_state[rows, places], output.pooler_output)


@pytest.mark.skipif(not hasattr(transformers, "Siglip2Model"), reason="SigLIP 2 of any resolution came with transformers 4.50")
def test_an_image_tower_that_needs_more_than_an_image_is_one_sentence(clip):
    config = transformers.Siglip2Config(
        text_config={**TOWER, "vocab_size": 600, "max_position_embeddings": 16, "projection_size": 32, "bos_token_id": 1,
                     "eos_token_id": 2}, vision_config={**TOWER, "patch_size": 16, "num_patches": 4},
    )  # fmt: skip
    transformers.Siglip2Model(config).save_pretrained(clip)
    with pytest.raises(PerPEFTError, match="cannot be used: ") as error:
        load_foundation(str(clip))
    assert "\n" not in str(error.value)


def test_a_clip_as_transformers_5_saves_it_is_read(tmp_path, tiny_clip):
    """It writes processor_config.json and no preprocessor_config.json."""
    clip = save_tiny_clip(tmp_path / "clip", tiny_titles())
    settings = json.loads((clip / "preprocessor_config.json").read_text())
    (clip / "preprocessor_config.json").unlink()
    content = {"image_processor": settings | {"image_processor_type": "CLIPImageProcessorFast"}}
    (clip / "processor_config.json").write_text(json.dumps(content))
    processor, expected = (load_foundation(str(folder)).image_processor for folder in (clip, tiny_clip))
    assert type(processor) is type(expected)
    assert dict(processor.size) == dict(expected.size) and dict(processor.crop_size) == dict(expected.crop_size)
