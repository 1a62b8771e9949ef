"""A pair of single encoders by --image_model and --text_model: adapters that peft opens; runs; refusals."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import AutoModel

import perpeft_iisan
from scripts import explain_item
from tests.conftest import fresh_data, iisan_arguments, run_on_folder, trained
from tests.items.families import encoder_of
from tests.run_files import change_json, summary_of
from utils.common.errors import PerPEFTError
from utils.items.foundation import load_foundation
from utils.items.model_files import PairName
from utils.training.checkpoints import save_adapter

CPU = torch.device("cpu")
EPOCHS = {"global_epochs": 1, "num_epochs": 1}


@pytest.fixture
def folders(models, tmp_path):
    """A folder with the folders of the encoders `vit` and `bert`, of the test's own."""
    return shutil.copytree(Path(models("vit + bert (mean)").text_model).parent, tmp_path / "encoders")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "ia3", "vera"])
def test_adapters_of_a_pair_open_with_peft(kind, models, dataset, tmp_path):
    name = models("dinov2 + distilbert (mean)")
    foundation = load_foundation(name)
    store = foundation.store(dataset)
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
    parts = {"vision_model": name.image_model, "text_model": name.text_model}
    pair = nn.ModuleDict({part: AutoModel.from_pretrained(folder) for part, folder in parts.items()})
    pair.base_model_prefix = ""  # peft 0.21 asks for it
    opened = PeftModel.from_pretrained(pair, tmp_path / "adapter").eval().base_model.model
    states = opened["text_model"](input_ids=tokens, attention_mask=mask).last_hidden_state
    titles = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
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
    perpeft_iisan.main(iisan_arguments(tiny_dataset, None, tmp_path / "iisan", **options))
    image_states, text_states, _ = torch.load(train_dir / "tiny_preX.pt", weights_only=True)
    assert (image_states.shape[1:], text_states.shape[1:]) == ((3, 0), (3, 24))
    assert json.loads((train_dir / "tiny_preX.json").read_text())["clip_model"] == f"{folders / 'bert'} (mean)"
    for folder in (*(tmp_path / "iisan").iterdir(), trained(tiny_dataset, None, tmp_path / "lora", **options)):
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


def test_a_pair_trains_and_opens_again_where_its_folders_have_moved(folders, tiny_dataset, tmp_path, capsys):
    def train(root):
        models = {"image_model": root / "vit", "text_model": root / "bert"}
        return trained(tiny_dataset, None, tmp_path / "runs", **models, **EPOCHS)

    folder = train(folders)
    there = folders.rename(tmp_path / "there")
    with pytest.raises(PerPEFTError, match="name it by --image_model DIR and .* name it by --text_model DIR"):
        shown_words(folder, tiny_dataset.train_dir, capsys)
    moved = ("--image_model", there / "vit", "--text_model", there / "bert")
    assert shown_words(folder, tiny_dataset.train_dir, capsys, *moved) == ["pale", "clock", "number", "3"]
    assert "of 2 × 2 patches" in (folder / "figures" / "explain_item_3.html").read_text()
    assert train(there) == folder
    assert "is finished" in capsys.readouterr().out
    change_json(there / "bert" / "config.json", lambda content: content.update(any="other content"))
    with pytest.raises(PerPEFTError, match="holds a run with other settings: contents_fingerprint was"):
        train(there)


def test_models_that_are_no_such_encoder_are_one_sentence(folders, tiny_clip):
    for name, expected in (
        (str(folders / "vit"), "kind 'vit', .*: --clip_model takes a dual encoder.* has no get_image_features or get_text"),
        (PairName(str(folders / "bert"), "any"), "kind 'bert', .*: --image_model takes an image encoder.* has no image input"),
        (PairName(None, str(tiny_clip)), "kind 'clip', .*: --text_model takes a text encoder.* has no text input"),
    ):
        with pytest.raises(PerPEFTError, match=expected) as error:
            load_foundation(name)
        assert "\n" not in str(error.value)
