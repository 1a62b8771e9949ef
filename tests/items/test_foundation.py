"""Dual encoders of each family, with random weights: features and states are transformers' own; parts that do not fit."""
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    AutoModel,
    AutoTokenizer,
    BertTokenizerFast,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    CLIPImageProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import perpeft_iisan
from models.clip_peft import ClipPeftEncoder
from models.peft_configs import peft_config
from models.towers import architecture
from tests.conftest import iisan_arguments, run_script, save_tiny_clip, tiny_arguments, tiny_titles
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.items.foundation import load_foundation

WORDS = sorted({word for title in tiny_titles() if title for word in title.split()} | {"no", "description", "available", "."})
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 32, "patch_size": 16}
SQUARE = {"height": 32, "width": 32}
CROPPED = {"size": {"shortest_edge": 32}, "crop_size": SQUARE}
FAMILIES = ("siglip", "chinese_clip", "altclip")


def word_tokenizer(specials, ending, **names):
    """A word-level tokenizer: `specials` come first, and `ending` is the template of a title."""
    vocabulary = {word: number for number, word in enumerate([*specials, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, names["unk_token"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    around = [(word, vocabulary[word]) for word in specials if word in ending]
    tokenizer.post_processor = processors.TemplateProcessing(single=ending, special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **names)


def save_siglip(folder):
    tokenizer = word_tokenizer(["<pad>", "</s>", "<unk>"], "$A </s>", unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "projection_size": 32}
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    SiglipImageProcessor(size=SQUARE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_chinese_clip(folder):
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    text = {**TOWER, "vocab_size": 5 + len(WORDS), "max_position_embeddings": 16}
    config = ChineseCLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 16}, projection_dim=16)
    ChineseCLIPModel(config).save_pretrained(folder)
    ChineseCLIPImageProcessor(size=SQUARE, do_center_crop=False).save_pretrained(folder)


def save_altclip(folder):
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>"}
    tokenizer = word_tokenizer(["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", **names)
    text = {**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 18, "project_dim": 24, "pad_token_id": 1}
    config = AltCLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 16}, projection_dim=16)
    config.text_config.project_dim = 24
    AltCLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(**CROPPED).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of one model a family."""
    torch.manual_seed(0)
    found = {}
    for save in (save_siglip, save_chinese_clip, save_altclip):
        name = save.__name__.removeprefix("save_")
        found[name] = tmp_path_factory.mktemp(name)
        save(found[name])
    return found


def own_inputs(folder, title, path):
    """One item's inputs as transformers prepares them."""
    foundation = load_foundation(str(folder))
    padding = "max_length" if "siglip" in folder.name else False
    tokens = AutoTokenizer.from_pretrained(folder)([title], padding=padding, truncation=True, max_length=16, return_tensors="pt")
    with Image.open(path) as image:
        pixels = foundation.image_processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    masked = {} if padding else {"attention_mask": tokens["attention_mask"]}
    return {"input_ids": tokens["input_ids"], **masked}, {"pixel_values": pixels}


def embedding(found):
    found = found if isinstance(found, torch.Tensor) else found.pooler_output
    return F.normalize(found, dim=-1)[0]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_features_and_states_are_transformers_own_of_single_items(family, folders, tiny_dataset):
    folder = folders[family]
    dataset = read_dataset(tiny_dataset.train_dir, tiny_dataset.name)
    foundation = load_foundation(str(folder))
    store = foundation.store(dataset)
    config = peft_config("lora", layers=architecture(foundation.clip.config).layers)
    image_states, text_states = foundation.hidden_states(store, torch.device("cpu"))
    encoder = ClipPeftEncoder(foundation.clip, config, foundation.image_processor).eval()
    features = encoder(*store.fetch(np.arange(1, 31), torch.device("cpu")))  # titles of several lengths in one batch
    plain = AutoModel.from_pretrained(folder).eval()
    for row in (0, 4, 5, 17):  # the fifth has no title, the sixth's is too long
        text, image = own_inputs(folder, dataset.titles[row], dataset.image_paths[row])
        expected = torch.cat([embedding(plain.get_image_features(**image)), embedding(plain.get_text_features(**text))])
        torch.testing.assert_close(features[row], expected, rtol=0, atol=1e-5)
        place = -1 if family == "siglip" else 0
        words = plain.text_model(**text, output_hidden_states=True).hidden_states
        patches = plain.vision_model(**image, output_hidden_states=True).hidden_states
        for state, layer in enumerate((0, 1, 2)):
            own = patches[layer][0].mean(0) if family == "siglip" else patches[layer][0, 0]
            torch.testing.assert_close(image_states[row, state], own, rtol=0, atol=1e-5)
            torch.testing.assert_close(text_states[row, state], words[layer][0, place], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapters_sit_on_the_same_layers_of_both_towers(family, kind, folders):
    foundation = load_foundation(str(folders[family]))
    config = peft_config(kind, layers=architecture(foundation.clip.config).layers)
    encoder = ClipPeftEncoder(foundation.clip, config, foundation.image_processor)
    names = [name for name in encoder.group_parameters(0) if "vision_model.head" not in name]  # SigLIP's own pooling layer
    layers = 2 * 2 * (2 if kind == "lora" else 3)  # two towers of two layers
    assert len(names) == layers * (2 if kind == "lora" else 1)
    assert {"vision_model", "text_model"} == {name.split(".")[2] for name in names}


def test_siglip_trains_all_stages_with_lora_and_with_iisan(folders, tiny_dataset, tmp_path):
    epochs = {"global_epochs": 1, "num_epochs": 1}
    run_script(tiny_arguments(tiny_dataset, folders["siglip"], tmp_path / "lora", **epochs))
    (folder,) = (tmp_path / "lora").iterdir()
    assert (folder / "personalized" / "group_2" / "adapter" / "adapter_model.safetensors").is_file()
    train_dir = tmp_path / "dataset"
    train_dir.mkdir()
    for path in tiny_dataset.train_dir.iterdir():
        if "_preX" not in path.name:  # another model's hidden states may lie there
            (train_dir / path.name).symlink_to(path)
    arguments = iisan_arguments(tiny_dataset, folders["siglip"], tmp_path / "iisan", train_dir=train_dir, **epochs)
    perpeft_iisan.main(arguments)
    assert json.loads((train_dir / "tiny_preX.json").read_text())["clip_model"] == str(folders["siglip"])


# ---------------------------------------------------------------- what is no dual encoder, or does not fit together


def test_a_model_of_another_kind_is_refused_in_a_sentence(tmp_path):
    ViTModel(ViTConfig(**VISION)).save_pretrained(tmp_path)
    with pytest.raises(PerPEFTError, match="of the kind 'vit', which does not fit.*clip, siglip") as error:
        load_foundation(str(tmp_path))
    assert "\n" not in str(error.value)


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture
def clip(tiny_clip, tmp_path):
    """A copy of the tiny CLIP, to be damaged."""
    return shutil.copytree(tiny_clip, tmp_path / "clip")


def test_a_processor_without_a_crop_is_read(clip, tiny_dataset):
    ViTImageProcessor(size=SQUARE).save_pretrained(clip)
    store = load_foundation(str(clip)).store(read_dataset(tiny_dataset.train_dir, tiny_dataset.name))
    assert store.pixels.shape == (30, 3, 32, 32)


def test_a_tokenizer_without_a_padding_token_is_read_with_the_same_features(clip, tiny_clip, tiny_dataset):
    tokenizer = AutoTokenizer.from_pretrained(clip)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(clip)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (clip / name).is_file():
            change(clip / name, pad_token=None)
    foundation = load_foundation(str(clip))
    dataset = read_dataset(tiny_dataset.train_dir, tiny_dataset.name)
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
    with pytest.raises(PerPEFTError, match=f"do not fit together: .*{expected}") as error:
        load_foundation(str(clip))
    assert "\n" not in str(error.value)


def test_a_larger_vocabulary_than_the_text_towers_is_one_sentence(clip):
    tokenizer = AutoTokenizer.from_pretrained(clip)
    tokenizer.add_tokens([f"word{number}" for number in range(3)])
    tokenizer.save_pretrained(clip)
    with pytest.raises(PerPEFTError, match=r"tokens up to number \d+, its text tower \d+ token embeddings"):
        load_foundation(str(clip))


@pytest.mark.parametrize("end", [49407, 5])
def test_a_pooled_token_that_the_tokenizer_does_not_write_is_one_sentence(end, clip, tiny_dataset):
    config = json.loads((clip / "config.json").read_text())
    config["text_config"]["eos_token_id"] = end
    (clip / "config.json").write_text(json.dumps(config))
    foundation = load_foundation(str(clip))
    with pytest.raises(PerPEFTError, match=f"does not fit its model.*eos_token_id {end} in config.json"):
        foundation.store(read_dataset(tiny_dataset.train_dir, tiny_dataset.name))


def test_a_tokenizer_that_ends_no_title_is_one_sentence(clip, tiny_dataset):
    foundation = load_foundation(str(clip))
    content = json.loads(foundation.tokenizer.backend_tokenizer.to_str()) | {"post_processor": None}
    bare = Tokenizer.from_str(json.dumps(content))
    foundation.tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=foundation.tokenizer.eos_token)
    with pytest.raises(PerPEFTError, match="does not fit its model: it ends a title by token"):
        foundation.store(read_dataset(tiny_dataset.train_dir, tiny_dataset.name))


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
