"""Runs on dual encoders other than CLIP, and on titles alone: training, attention, recommendations, tables."""
import functools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from scripts import check_data, explain_item, export_vectors, recommend
from tests.conftest import exit_code, run_on_folder, tiny_arguments, trained
from tests.items.families import seeded
from tests.run_files import summary_of
from utils.analysis.attention import explain_items
from utils.analysis.tables import finished_blocks
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.items.foundation import ensure_hidden_states
from utils.items.hidden_states import HiddenStateStore
from utils.run.finished import finished_dataset, finished_options

EPOCHS = {"global_epochs": 1, "num_epochs": 1}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs_of(tiny_dataset, tmp_path_factory):
    """The model folder and the run folder of a family: SigLIP's run has groups, the others' only the global adapter."""

    @functools.cache
    def of(family):
        model = seeded(family, tmp_path_factory.mktemp(family))
        method = "perpeft" if family == "siglip" else "global"
        return model, trained(tiny_dataset, model, tmp_path_factory.mktemp(f"{family}_runs"), method=method, **EPOCHS)

    return of


@pytest.mark.parametrize("family", ["siglip", "chinese_clip", "altclip"])
def test_attention_is_that_of_the_plain_model_with_the_saved_adapter(family, runs_of, tiny_dataset):
    model, folder = runs_of(family)
    options, expected = finished_options(folder, tiny_dataset.train_dir, "cpu")
    (explanation,) = explain_items(options, finished_dataset(options, expected), folder, [3])
    assert explanation.words == ["pale", "clock", "number", "3"]  # a token each
    plain = AutoModel.from_pretrained(model, attn_implementation="eager")
    plain = PeftModel.from_pretrained(plain, folder / "global" / "adapter")
    padding = "max_length" if family == "siglip" else False
    tokens = AutoTokenizer.from_pretrained(model)(["pale clock number 3"], padding=padding, max_length=16, return_tensors="pt")
    masked = {} if padding else {"attention_mask": tokens["attention_mask"]}
    with torch.no_grad():
        read = plain.eval().base_model.model.text_model(input_ids=tokens["input_ids"], output_attentions=True, **masked)
    of_tokens = read.attentions[-1][0].mean(0)[-1 if padding else 0]
    words = of_tokens[:4] if padding else of_tokens[1:5]  # SigLIP begins with no special token
    assert explanation.views[0].words == pytest.approx((words / words.sum()).numpy(), abs=1e-5)
    assert (explanation.views[0].patches is None) == (family == "siglip")


def test_siglips_run_is_explained_exported_recommended_from_and_in_tables(runs_of, tiny_dataset, tmp_path, capsys):
    model, folder = runs_of("siglip")
    run_on_folder(explain_item, folder, "--train_dir", tiny_dataset.train_dir, "--item", "3")
    assert re.search(r"group 1.*pale \d+  clock \d+  number \d+  3 \d+", capsys.readouterr().out)
    run_on_folder(recommend, folder, "--train_dir", tiny_dataset.train_dir, "--history", "B001", "B002")
    found = json.loads((folder / "figures" / "recommend_new.json").read_text())
    assert found["history"] and found["recommendations"]
    run_on_folder(export_vectors, folder, "--train_dir", tiny_dataset.train_dir, "--output", tmp_path / "vectors")
    assert (tmp_path / "vectors" / "item_ids.txt").read_text().split() == [f"B{item:03d}" for item in range(1, 31)]
    passed_on = tiny_arguments(tiny_dataset, model, folder.parent, None, dataset=None, **EPOCHS)
    (block,) = finished_blocks("tiny", 1, passed_on)
    test = summary_of(folder)["personalized"]["test"]
    assert [100 * test["HR@20"]] == pytest.approx([row.mean["HR@20"] for row in block.rows])


@pytest.mark.parametrize(("family", "widths"), [("siglip", (32, 32)), ("larger clip", (48, 32))])
def test_iisan_takes_its_sizes_from_the_model(family, widths, begin, tmp_path):
    model = seeded(family, tmp_path / "model")
    run = begin(kind="iisan", clip_model=model, **EPOCHS)
    run.train()
    assert json.loads((run.train_dir / "tiny_preX.json").read_text())["clip_model"] == str(model)
    states = torch.load(run.train_dir / "tiny_preX.pt", weights_only=True)[:2]
    assert tuple(part.shape[1:] for part in states) == tuple((3, width) for width in widths)
    projector = torch.load(run.folder / "global" / "projector.pth", weights_only=True)
    assert projector["projector.0.weight"].shape == (64, 32 + sum(widths))  # text, image and both, which is as wide as text


def test_an_image_only_run_without_a_class_token_shows_no_attention_and_says_why(runs_of, begin):
    run = begin(clip_model=runs_of("siglip")[0], modality="image", method="global", **EPOCHS)
    run.train()
    with pytest.raises(PerPEFTError, match="cannot be shown for .*its image tower has no class token"):
        run_on_folder(explain_item, run.folder, "--train_dir", run.train_dir, "--item", "3")


@pytest.fixture
def titles_only(begin):
    """A run on titles whose data set has no images."""
    run = begin(modality="text", method="global", **EPOCHS)
    shutil.rmtree(run.train_dir / "tiny_images")
    return run


def test_a_dual_encoder_trains_and_check_data_passes_on_titles_without_any_image(titles_only, tiny_dataset, capsys):
    checked = ["--dataset", "tiny", "--train_dir", titles_only.train_dir, "--modality"]
    for modality, code in (("text", 0), ("both", 2)):
        assert exit_code([*checked, modality], check_data.main) == code
        assert ("tiny_images (No such file" in capsys.readouterr().out) == bool(code)
    titles_only.train()
    (store,) = titles_only.train_dir.rglob("images.npy")
    assert np.load(store).shape == (30, 3, 1, 1)  # none are stored
    (titles_only.train_dir / "tiny_images").mkdir()
    shutil.copy(tiny_dataset.train_dir / "tiny_images" / "B001.jpg", titles_only.train_dir / "tiny_images")
    options, expected = finished_options(titles_only.folder, titles_only.train_dir, "cpu")
    assert finished_dataset(options, expected).num_items == 30  # whatever images come later


def test_states_of_titles_alone_hold_no_images_and_are_computed_again_where_those_are_needed(
    titles_only, tiny_clip, tiny_dataset
):
    name, train_dir = str(tiny_clip), titles_only.train_dir
    dataset = read_dataset(train_dir, "tiny", missing_images="unused")
    path = ensure_hidden_states(dataset, name, CPU, "unused", "text")
    alone = torch.load(path, weights_only=True)
    assert alone[0].shape == (30, 3, 0) and alone[1].shape == (30, 3, 32)
    with pytest.raises(PerPEFTError, match="holds no image states"):
        HiddenStateStore.open(dataset, name)
    shutil.copytree(tiny_dataset.train_dir / "tiny_images", train_dir / "tiny_images")
    dataset = read_dataset(train_dir, "tiny")
    ensure_hidden_states(dataset, name, CPU)
    both = torch.load(path, weights_only=True)
    assert both[0].shape == (30, 3, 32)
    torch.testing.assert_close(both[1], alone[1], rtol=0, atol=1e-5)
    images, titles = HiddenStateStore.open(dataset, name, modality="text").fetch(np.array([2, 7]), CPU)
    assert images.shape == (2, 3, 0) and torch.equal(titles, both[1][[1, 6]])
