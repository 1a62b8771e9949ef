"""A pair of single encoders by --image_model and --text_model: features and states are transformers' own; runs; refusals."""
import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    DistilBertConfig,
    DistilBertModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import perpeft_iisan
from models import ClipPeftEncoder
from models.peft_configs import peft_config
from models.towers import layers_of
from scripts import explain_item
from tests.conftest import fresh_data, iisan_arguments, run_on_folder, run_script, tiny_arguments
from tests.items.families import RESIZED, SMALL, TOWER, save_tokenizer
from tests.run_files import summary_of
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.items.foundation import load_foundation
from utils.items.model_files import PairName
from utils.training.checkpoints import save_adapter


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind of encoder, with random weights: images 32 wide, titles 24."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("encoders")
    cropped = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}  # DINOv2 interpolates positions
    images = {
        "vit": (ViTModel(ViTConfig(**TOWER, **SMALL), add_pooling_layer=False), ViTImageProcessor(**RESIZED)),
        "dinov2": (Dinov2Model(Dinov2Config(**TOWER, **SMALL, mlp_ratio=2)), BitImageProcessor(**cropped)),
        "siglip": (SiglipVisionModel(SiglipVisionConfig(**TOWER, **SMALL)), ViTImageProcessor(**RESIZED)),
    }
    for name, (model, processor) in images.items():
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    small = {"dim": 24, "n_layers": 4, "n_heads": 2, "hidden_dim": 48}
    vocabulary = {"vocab_size": len(save_tokenizer("bert", root / "bert")), "max_position_embeddings": 16}
    save_tokenizer("bert", root / "distilbert")
    BertModel(BertConfig(**TOWER | {"hidden_size": 24}, **vocabulary), add_pooling_layer=False).save_pretrained(root / "bert")
    DistilBertModel(DistilBertConfig(**small, **vocabulary)).save_pretrained(root / "distilbert")
    return root


def name_of(folders, image, text, pooling="mean"):
    return PairName(str(folders / image) if image else None, str(folders / text), pooling)


def pooled(states, pooling):
    """What is pooled of one item's states, [1, length, width] -> [width]."""
    return states[0, 0] if pooling == "cls" else states[0].mean(0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("image", "text", "pooling"),
    [("vit", "bert", "mean"), ("vit", "bert", "cls"), ("dinov2", "distilbert", "mean"), ("siglip", "bert", "mean")],
)
def test_features_and_states_are_the_encoders_own_of_single_items(image, text, pooling, folders, tiny_dataset):
    dataset = read_dataset(tiny_dataset.train_dir, tiny_dataset.name)
    name = name_of(folders, image, text, pooling)
    foundation = load_foundation(name)
    store = foundation.store(dataset)
    image_states, text_states = foundation.hidden_states(store, torch.device("cpu"))
    config = peft_config("lora", layers=layers_of(foundation.clip))
    encoder = ClipPeftEncoder(foundation.clip, config, foundation.image_processor, traits=foundation.traits).eval()
    features = encoder(*store.fetch(store.reading_order(), torch.device("cpu")))
    assert features.shape[1] == encoder.feature_dim == 32 + 24
    images, texts = AutoModel.from_pretrained(name.image_model).eval(), AutoModel.from_pretrained(name.text_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(name.text_model)
    for row, item in enumerate(store.reading_order()):
        with Image.open(dataset.image_paths[item - 1]) as opened:
            pixels = foundation.image_processor(opened.convert("RGB"), return_tensors="pt")["pixel_values"]
        tokens = tokenizer([dataset.titles[item - 1]], truncation=True, max_length=16, return_tensors="pt")
        tokens.pop("token_type_ids", None)
        seen, read = images(pixels, output_hidden_states=True), texts(**tokens, output_hidden_states=True)
        kind = "mean" if image == "siglip" else "cls"
        own = pooled(seen.last_hidden_state, kind), pooled(read.last_hidden_state, pooling)
        expected = torch.cat([F.normalize(part, dim=0) for part in own])
        torch.testing.assert_close(features[row], expected, rtol=0, atol=1e-5)
        deeper = (len(read.hidden_states) - 1) // 2  # DistilBERT is twice as deep as the image encoder with its two layers
        for state, layers in enumerate(((0, 0), (1, deeper), (2, 2 * deeper))):
            expected = pooled(seen.hidden_states[layers[0]], kind), pooled(read.hidden_states[layers[1]], pooling)
            torch.testing.assert_close(image_states[item - 1, state], expected[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(text_states[item - 1, state], expected[1], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "ia3", "vera"])
def test_adapters_sit_in_both_encoders_and_open_with_peft(kind, folders, tiny_dataset, tmp_path):
    name = name_of(folders, "dinov2", "distilbert")
    foundation = load_foundation(name)
    store = foundation.store(read_dataset(tiny_dataset.train_dir, tiny_dataset.name))
    config = peft_config(kind, layers=layers_of(foundation.clip))
    encoder = ClipPeftEncoder(foundation.clip, config, foundation.image_processor, traits=foundation.traits).eval()
    layers = {re.sub(r"\.(lora_|ia3_|vera_).*", "", key) for key in encoder.group_parameters(0)}
    assert len(layers) == (3 if kind == "ia3" else 2) * (2 + 4)  # of each of 2 image and 4 text layers
    encoder.clone_groups(2)
    for parameter in encoder.group_parameters(1).values():
        parameter.add_(0.1)
    encoder.use_group(1)
    pixels, tokens, mask = store.fetch(store.reading_order()[:5], torch.device("cpu"))
    features = encoder(pixels, tokens, mask)
    save_adapter(encoder, tmp_path, 1)
    pair = {"vision_model": AutoModel.from_pretrained(name.image_model), "text_model": AutoModel.from_pretrained(name.text_model)}
    pair = nn.ModuleDict(pair)
    pair.base_model_prefix = ""  # peft 0.21 asks for it
    opened = PeftModel.from_pretrained(pair, tmp_path / "adapter").eval().base_model.model
    states = opened["text_model"](input_ids=tokens, attention_mask=mask).last_hidden_state
    titles = torch.stack([pooled(row[None, : int(length)], "mean") for row, length in zip(states, mask.sum(1))])
    images = opened["vision_model"](encoder._shift + pixels.float() * encoder._scale).last_hidden_state[:, 0]
    expected = torch.cat([F.normalize(images, dim=-1), F.normalize(titles, dim=-1)], dim=1)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def shown_words(folder, train_dir, capsys, *more):
    """The words of item 3's title that explain_item prints for group 0."""
    run_on_folder(explain_item, folder, "--train_dir", train_dir, "--item", "3", *more)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("group 0")]
    return re.findall(r"(\S+) \d+(?:  |$)", line.split("users)")[1])


def test_a_text_encoder_alone_trains_on_titles_without_any_image(folders, tiny_dataset, tmp_path, capsys):
    train_dir = fresh_data(tiny_dataset, tmp_path / "dataset", "*_images").train_dir
    options = {
        "train_dir": train_dir, "clip_model": None, "text_model": folders / "bert", "modality": "text", "global_epochs": 1,
        "num_epochs": 1,
    }  # fmt: skip
    run_script(tiny_arguments(tiny_dataset, None, tmp_path / "lora", **options))
    perpeft_iisan.main(iisan_arguments(tiny_dataset, None, tmp_path / "iisan", **options))
    image_states, text_states, _ = torch.load(train_dir / "tiny_preX.pt", weights_only=True)
    assert (image_states.shape[1:], text_states.shape[1:]) == ((3, 0), (3, 24))
    assert json.loads((train_dir / "tiny_preX.json").read_text())["clip_model"] == f"{folders / 'bert'} (mean)"
    for kind, width, adapter in (("lora", 24, 2 * 2 * 4 * (24 + 24)), ("iisan", 24, None)):
        (folder,) = (tmp_path / kind).iterdir()
        projector = torch.load(folder / "global" / "projector.pth", weights_only=True)
        assert projector["projector.0.weight"].shape == (64, width)
        counts = summary_of(folder)["trainable_parameters"]
        assert counts["adapter_of_one_group"] == adapter or adapter is None
        assert counts["foundation_model"] == sum(p.numel() for p in AutoModel.from_pretrained(folders / "bert").parameters())
    (folder,) = (tmp_path / "lora").iterdir()
    assert shown_words(folder, train_dir, capsys) == ["pale", "clock", "number", "3"]
    options["text_model"] = shutil.copytree(folders / "bert", tmp_path / "moved")
    perpeft_iisan.main(iisan_arguments(tiny_dataset, None, tmp_path / "iisan", **options))
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(PerPEFTError, match=r"computed by '.*bert \(mean\)', not '.*moved \(cls\)'"):
        perpeft_iisan.main(iisan_arguments(tiny_dataset, None, tmp_path / "other", **options, text_pooling="cls"))


def arguments_for(root, dataset, runs):
    """The command line of a run on the pair in a folder."""
    options = {"clip_model": None, "image_model": root / "vit", "text_model": root / "bert"}
    return tiny_arguments(dataset, None, runs, **options, global_epochs=1, num_epochs=1)


def test_a_pair_trains_and_opens_again_where_its_folders_have_moved(folders, tiny_dataset, tmp_path, capsys):
    here, there = shutil.copytree(folders, tmp_path / "here"), tmp_path / "there"
    run_script(arguments_for(here, tiny_dataset, tmp_path / "runs"))
    (folder,) = (tmp_path / "runs").iterdir()
    here.rename(there)
    with pytest.raises(PerPEFTError, match="name it by --image_model DIR and .* name it by --text_model DIR"):
        shown_words(folder, tiny_dataset.train_dir, capsys)
    moved = ("--image_model", there / "vit", "--text_model", there / "bert")
    assert shown_words(folder, tiny_dataset.train_dir, capsys, *moved) == ["pale", "clock", "number", "3"]
    assert "of 2 × 2 patches" in (folder / "figures" / "explain_item_3.html").read_text()
    run_script(arguments_for(there, tiny_dataset, tmp_path / "runs"))  # the same run
    assert "is finished" in capsys.readouterr().out
    (there / "bert" / "config.json").write_text((there / "bert" / "config.json").read_text() + " ")
    with pytest.raises(PerPEFTError, match="holds a run with other settings: contents_fingerprint was"):
        run_script(arguments_for(there, tiny_dataset, tmp_path / "runs"))


def test_models_that_are_no_such_encoder_are_one_sentence(folders, tiny_clip):
    for name, expected in (
        (PairName(str(folders / "bert"), "any"), "kind 'bert', .*: --image_model takes an image encoder.* has no image input"),
        (PairName(None, str(tiny_clip)), "kind 'clip', .*: --text_model takes a text encoder.* has no text input"),
    ):
        with pytest.raises(PerPEFTError, match=expected) as error:
            load_foundation(name)
        assert "\n" not in str(error.value)
