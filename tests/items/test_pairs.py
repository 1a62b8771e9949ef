"""A pair of single encoders by --image_model and --text_model: features and states are transformers' own; runs; refusals."""
import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers import AutoModel, AutoTokenizer, BitImageProcessor, ViTImageProcessor

import perpeft_iisan
from scripts import explain_item
from tests.conftest import fresh_data, iisan_arguments, run_on_folder, run_script, tiny_arguments
from tests.items.families import RESIZED, SMALL, TOWER, encoder_of, save_tokenizer
from tests.run_files import summary_of
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.items.foundation import load_foundation
from utils.items.model_files import PairName
from utils.training.checkpoints import save_adapter

CPU = torch.device("cpu")
EPOCHS = {"global_epochs": 1, "num_epochs": 1}


def random_model(prefix, settings, **options):
    """An encoder of transformers with random weights."""
    return getattr(transformers, f"{prefix}Model")(getattr(transformers, f"{prefix}Config")(**settings), **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each kind of encoder, with random weights: images 32 wide, titles 24."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("encoders")
    tokenizer, resized = save_tokenizer("bert", root / "bert"), ViTImageProcessor(**RESIZED)
    cropped = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}}  # DINOv2 interpolates positions
    vocabulary = {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    deeper = {**vocabulary, "dim": 24, "n_layers": 4, "n_heads": 2, "hidden_dim": 48}
    encoders = {
        "vit": (random_model("ViT", TOWER | SMALL, add_pooling_layer=False), resized),
        "dinov2": (random_model("Dinov2", TOWER | SMALL | {"mlp_ratio": 2}), BitImageProcessor(**cropped)),
        "siglip": (random_model("SiglipVision", TOWER | SMALL), resized),
        "bert": (random_model("Bert", TOWER | vocabulary | {"hidden_size": 24}, add_pooling_layer=False), tokenizer),
        "distilbert": (random_model("DistilBert", deeper), tokenizer),
    }
    for name, parts in encoders.items():
        for part in parts:
            part.save_pretrained(root / name)
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
    image_states, text_states = foundation.hidden_states(store, CPU)
    encoder = encoder_of(foundation)
    features = encoder(*store.fetch(store.reading_order(), CPU))
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
    encoder = encoder_of(foundation, kind)
    layers = {re.sub(r"\.(lora_|ia3_|vera_).*", "", key) for key in encoder.group_parameters(0)}
    assert len(layers) == (3 if kind == "ia3" else 2) * (2 + 4)  # of each of 2 image and 4 text layers
    encoder.clone_groups(2)
    for parameter in encoder.group_parameters(1).values():
        parameter.add_(0.1)
    encoder.use_group(1)
    pixels, tokens, mask = store.fetch(store.reading_order()[:5], CPU)
    features = encoder(pixels, tokens, mask)
    save_adapter(encoder, tmp_path, 1)
    models = {"vision_model": name.image_model, "text_model": name.text_model}
    pair = nn.ModuleDict({part: AutoModel.from_pretrained(folder) for part, folder in models.items()})
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
    options = {"train_dir": train_dir, "text_model": folders / "bert", "modality": "text", **EPOCHS}
    run_script(tiny_arguments(tiny_dataset, None, tmp_path / "lora", **options))
    perpeft_iisan.main(iisan_arguments(tiny_dataset, None, tmp_path / "iisan", **options))
    image_states, text_states, _ = torch.load(train_dir / "tiny_preX.pt", weights_only=True)
    assert (image_states.shape[1:], text_states.shape[1:]) == ((3, 0), (3, 24))
    assert json.loads((train_dir / "tiny_preX.json").read_text())["clip_model"] == f"{folders / 'bert'} (mean)"
    for kind in ("iisan", "lora"):
        (folder,) = (tmp_path / kind).iterdir()
        projector = torch.load(folder / "global" / "projector.pth", weights_only=True)
        assert projector["projector.0.weight"].shape == (64, 24)
        counts = summary_of(folder)["trainable_parameters"]
        assert counts["foundation_model"] == sum(p.numel() for p in AutoModel.from_pretrained(folders / "bert").parameters())
    assert counts["adapter_of_one_group"] == 2 * 2 * 4 * (24 + 24)  # LoRA's
    assert shown_words(folder, train_dir, capsys) == ["pale", "clock", "number", "3"]
    options["text_model"] = shutil.copytree(folders / "bert", tmp_path / "moved")
    perpeft_iisan.main(iisan_arguments(tiny_dataset, None, tmp_path / "iisan", **options))
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(PerPEFTError, match=r"computed by '.*bert \(mean\)', not '.*moved \(cls\)'"):
        perpeft_iisan.main(iisan_arguments(tiny_dataset, None, tmp_path / "other", **options, text_pooling="cls"))


def arguments_for(root, dataset, runs):
    """The command line of a run on the pair in a folder."""
    return tiny_arguments(dataset, None, runs, image_model=root / "vit", text_model=root / "bert", **EPOCHS)


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
    with (there / "bert" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(PerPEFTError, match="holds a run with other settings: contents_fingerprint was"):
        run_script(arguments_for(there, tiny_dataset, tmp_path / "runs"))


def test_models_that_are_no_such_encoder_are_one_sentence(folders, tiny_clip):
    for name, expected in (
        (str(folders / "vit"), "kind 'vit', .*: --clip_model takes a dual encoder.* has no get_image_features or get_text"),
        (PairName(str(folders / "bert"), "any"), "kind 'bert', .*: --image_model takes an image encoder.* has no image input"),
        (PairName(None, str(tiny_clip)), "kind 'clip', .*: --text_model takes a text encoder.* has no text input"),
    ):
        with pytest.raises(PerPEFTError, match=expected) as error:
            load_foundation(name)
        assert "\n" not in str(error.value)
