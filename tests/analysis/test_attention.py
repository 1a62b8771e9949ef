"""Attention against plain transformers and peft, and what explain_item writes."""
import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, CLIPModel

from scripts import explain_item, recommend
from tests.analysis.pages import check_page, classes
from tests.conftest import run_on_folder, trained
from tests.plain import clip_inputs
from tests.run_files import tree
from utils.analysis.attention import View, explain_items, words_of_tokens
from utils.run.finished import finished_dataset, finished_options


def explained(folder, train_dir, item):
    options, expected = finished_options(folder, train_dir, "cpu")
    return explain_items(options, finished_dataset(options, expected), folder, [item])[0]


def test_tokens_are_merged_into_the_words_that_they_are_part_of():
    title = "Red  wool-mug, by Brisk"
    offsets = [(0, 0), (0, 3), (5, 9), (9, 10), (10, 13), (13, 14), (15, 17), (0, 0)]  # cut before the last word
    words, places = words_of_tokens(title, offsets)
    assert words == ["Red", "wool-mug,", "by"] and places.tolist() == [-1, 0, 1, 1, 1, 1, 2, -1]


def test_moved_attention_is_what_lies_elsewhere():
    before = View("", np.array([1.0, 0.0]), np.array([[0.5, 0.25], [0.25, 0.0]]))
    after = View("", np.array([0.0, 1.0]), np.array([[0.25, 0.25], [0.25, 0.25]]))
    assert after.moved_from(before) == "words 100 % moved, image 25 % moved"
    assert after.moved_from(after) == "" and after._replace(words=None).moved_from(before) == "image 25 % moved"


@torch.no_grad()
def plain_attention(tiny_dataset, tiny_clip, adapter, item):
    """Shares of tokens and patches by transformers and peft alone: last layer, mean over heads, from the pooled position."""
    clip = CLIPModel.from_pretrained(tiny_clip, attn_implementation="eager")
    model = PeftModel.from_pretrained(clip, adapter).eval()
    output = model(**clip_inputs(tiny_dataset, tiny_clip, [item]), output_attentions=True)
    tokens = output.text_model_output.attentions[-1][0].mean(0)[-1, 1:-1]  # from the end of text, to what lies between
    patches = output.vision_model_output.attentions[-1][0].mean(0)[0, 1:]
    return (tokens / tokens.sum()).numpy(), (patches / patches.sum()).numpy()


@pytest.mark.parametrize("item", [1, 5, 6])  # an ordinary title, none, and one that is cut
def test_attention_is_that_of_a_plain_clip_with_the_saved_adapter(tiny_run, tiny_dataset, tiny_clip, item):
    explanation = explained(tiny_run.folder, tiny_dataset.train_dir, item)
    assert [view.label.split(" (")[0] for view in explanation.views] == ["global", "group 0", "group 1", "group 2"]
    title = tiny_dataset.titles[item - 1] or "No description available."
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip)
    ids = tokenizer(title, truncation=True, max_length=16)["input_ids"][1:-1]
    pieces = [piece.replace("</w>", "") for piece in tokenizer.convert_ids_to_tokens(ids)]
    ends = np.cumsum([len(word) for word in explanation.words])  # of words in the title without spaces
    assert "".join(explanation.words).lower().startswith("".join(pieces))
    adapters = [tiny_run.folder / "global", *(tiny_run.folder / "personalized" / f"group_{group}" for group in range(3))]
    for view, folder in zip(explanation.views, adapters):
        tokens, patches = plain_attention(tiny_dataset, tiny_clip, folder / "adapter", item)
        words = np.bincount(np.searchsorted(ends, np.cumsum([len(piece) for piece in pieces])), tokens)
        assert view.words == pytest.approx(words, abs=1e-6) and view.words.sum() == pytest.approx(1)
        assert view.patches.ravel() == pytest.approx(patches, abs=1e-6) and view.patches.shape == (2, 2)
    assert np.ptp([view.words for view in explanation.views], axis=0).max() > 1e-4  # the groups do differ


def test_explanation_is_written_and_printed(copied_run, tiny_dataset, analyse, capsys):
    before = tree(copied_run.folder)
    for name, number in (("B003", 3), ("6", 6)):
        analyse(explain_item, copied_run.folder, "--item", name)
        page = check_page(copied_run.folder / "figures" / f"explain_item_{number}.html")
        assert tiny_dataset.titles[number - 1].strip() in page.text
        assert len(page.all("image")) == 2 + 4  # the item whole and as CLIP sees it; an overlay for each adapter
    assert set(tree(copied_run.folder)) - set(before) == {"figures/explain_item_3.html", "figures/explain_item_6.html"}
    output = capsys.readouterr().out
    assert "group 2" in output and all(word in output for word in tiny_dataset.titles[2].split())


@pytest.mark.parametrize("modality", ["image", "text"])
def test_run_of_one_modality_shows_what_it_looks_at(tiny_dataset, tiny_clip, analyse, tmp_path, modality):
    short = {"method": "global", "global_epochs": 1, "num_epochs": 1}
    folder = trained(tiny_dataset, tiny_clip, tmp_path, peft_type="ia3", modality=modality, **short)
    (view,) = explained(folder, tiny_dataset.train_dir, 1).views
    assert (view.words is None, view.patches is None) == (modality == "image", modality == "text")
    analyse(explain_item, folder, "--item", 1)
    page = check_page(folder / "figures" / "explain_item_1.html")
    assert (len(classes(page, "words")), len(page.all("image"))) == ((0, 3) if modality == "image" else (1, 2))


def test_end_of_text_within_a_title_ends_what_is_read(copied_run, relabelled, capsys):
    """CLIP pools the first one and never reads what follows it; where it comes first there is the image alone."""
    data = relabelled(titles=["red lamp <|endoftext|> pale mug", "<|endoftext|> pale mug"])
    explanation = explained(copied_run.folder, data, 1)
    assert explanation.words == ["red", "lamp"] and explanation.views[0].words.shape == (2,)
    run_on_folder(explain_item, copied_run.folder, "--train_dir", data, "--item", 2)
    page = check_page(copied_run.folder / "figures" / "explain_item_2.html")
    note = "CLIP reads no word of this title, which begins with its end-of-text token."
    assert note in page.text and note in capsys.readouterr().out
    assert not classes(page, "words") and len(page.all("image")) == 2 + 4


def test_raw_id_that_begins_with_a_dash_is_found(copied_run, relabelled):
    where = copied_run.folder, "--train_dir", relabelled(raw_ids=["-0iIxySkp97W", "--device"])
    run_on_folder(explain_item, *where, "--item", "-0iIxySkp97W")
    assert "-0iIxySkp97W" in check_page(copied_run.folder / "figures" / "explain_item_1.html").text
    run_on_folder(recommend, *where, "--history", "-0iIxySkp97W", "B003", "--top_k", 2)
    history = json.loads((copied_run.folder / "figures" / "recommend_new.json").read_text())["history"]
    assert [item["item"] for item in history] == [1, 3]
