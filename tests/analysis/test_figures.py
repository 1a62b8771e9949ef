"""The figures of a finished run: numbers against hand-computed ones, attention against plain peft, images that open."""
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from scripts import explain_item as explain_script
from scripts import plot_run
from tests.conftest import NUM_ITEMS, run_on_folder, run_script, tiny_arguments, write_dataset
from tests.run.test_pipeline import read_csv, tree
from utils.analysis import figures as run_figures
from utils.analysis.attention import explain_item, moved, words_of_tokens
from utils.analysis.figures import draw_map, gains, mean_interval, typical_items
from utils.analysis.sheets import SheetRow, Tile, cut_title, draw_sheet, thumbnail
from utils.common.errors import PerPEFTError
from utils.data.histories import Histories


def is_png(path, least=200):
    with Image.open(path) as image:
        image.load()
        shades = np.unique(np.asarray(image.convert("L")))
        return image.format == "PNG" and min(image.size) >= least and len(shades) > 10  # and not all of one colour


# ---------------------------------------------------------------- what is typical of a group


def test_typical_items_agree_with_the_formula_by_a_loop():
    random = np.random.default_rng(0)
    lists = [random.choice(np.arange(1, 13), size=6, p=np.arange(1, 13) / 78).tolist() for _ in range(30)]
    groups = np.arange(30) % 3
    found = typical_items(Histories.of_lists(lists), groups, 1, 12, top=4)
    ours = [sum(items.count(item) for items, group in zip(lists, groups) if group == 1) for item in range(1, 13)]
    theirs = [sum(items.count(item) for items, group in zip(lists, groups) if group != 1) for item in range(1, 13)]
    prior = [12 * (a + b) / 180 for a, b in zip(ours, theirs)]
    scores = {}
    for item, (y, z, a) in enumerate(zip(ours, theirs, prior), 1):
        if y + z:
            difference = math.log((y + a) / (sum(ours) + 12 - y - a)) - math.log((z + a) / (sum(theirs) + 12 - z - a))
            scores[item] = difference / math.sqrt(1 / (y + a) + 1 / (z + a))
    best = [item for item in sorted(scores, key=lambda item: -scores[item]) if scores[item] > 0][:4]
    assert found.items.tolist() == best and len(best) > 1
    assert found.counts.tolist() == [ours[item - 1] for item in best]
    lifts = [ours[item - 1] / 60 / (theirs[item - 1] / 120) if theirs[item - 1] else math.inf for item in best]
    assert found.lifts.tolist() == pytest.approx(lifts)


def test_item_bought_once_by_chance_is_less_typical_than_one_bought_often():
    lists = [[1, 1, 1, 2], [1, 1, 3, 4], [3, 4, 4, 3], [1, 3, 4, 3]]
    found = typical_items(Histories.of_lists(lists), np.array([0, 0, 1, 1]), 0, 5)
    assert found.items.tolist()[:2] == [1, 2]
    assert np.isinf(found.lifts[1]) and found.lifts[0] == pytest.approx(5)  # by the ratio alone, item 2 would come first
    assert set(found.items) <= {1, 2}  # what others buy more of is not typical, nor what nobody buys


def test_group_without_users_has_no_typical_items():
    assert typical_items(Histories.of_lists([[1, 2], [2]]), np.array([0, 0]), 1, 3).items.tolist() == []
    assert typical_items(Histories.of_lists([[], []]), np.array([0, 1]), 1, 3).items.tolist() == []


# ---------------------------------------------------------------- gains


def test_interval_agrees_with_one_computed_by_hand():
    mean, low, high = mean_interval(np.array([1.0, 2.0, 3.0, 4.0]))
    half = 3.182446 * 1.290994 / 2  # t of 3 degrees of freedom at 97.5 %, times s / sqrt(n)
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-5)
    assert mean_interval(np.array([0.5]))[0] == 0.5 and np.isnan(mean_interval(np.array([0.5]))[1:]).all()
    assert np.isnan(mean_interval(np.array([]))).all()


def ndcg(rank):
    return 1 / math.log2(rank + 2) if rank < 20 else 0.0


def test_gains_by_group_follow_from_the_ranks_and_their_total_from_the_summary(tiny_run):
    groups = {row["user"]: int(row["group"]) for row in read_csv(tiny_run.folder / "groups.csv")}
    before = {row["user"]: int(row["test_rank"]) for row in read_csv(tiny_run.folder / "global_ranks.csv")}
    after = {row["user"]: int(row["test_rank"]) for row in read_csv(tiny_run.folder / "personalized_ranks.csv")}
    found = gains(tiny_run.folder, np.array(list(groups), dtype=int), np.array(list(groups.values())), 3)
    for group in range(3):
        differences = [ndcg(after[user]) - ndcg(before[user]) for user in after if groups[user] == group]
        assert (found[group].label, found[group].users) == (f"group {group}", len(differences))
        assert found[group].mean == pytest.approx(np.mean(differences), abs=1e-12)
        assert found[group].low < found[group].mean < found[group].high
    summary = json.loads((tiny_run.folder / "summary.json").read_text())
    total = summary["personalized"]["test"]["NDCG@20"] - summary["global"]["test"]["NDCG@20"]
    assert found[3].mean == pytest.approx(total, abs=1e-12) and found[3].users == len(after)


# ---------------------------------------------------------------- plot_run


def test_plot_run_draws_all_figures_and_touches_nothing_else(copied_run, tiny_dataset, capsys):
    before = tree(copied_run.folder)
    run_on_folder(plot_run, copied_run.folder, "--train_dir", tiny_dataset.train_dir)
    after = tree(copied_run.folder)
    assert after.items() >= before.items()
    assert set(after) - set(before) == {f"figures/{name}.png" for name in ("curves", "groups", "users", "gain")}
    for name in ("curves", "groups", "users", "gain"):
        assert is_png(copied_run.folder / "figures" / f"{name}.png")
    output = capsys.readouterr().out
    assert "all users" in output and "figures/gain.png" in output


def test_run_without_groups_has_its_curves_drawn_and_that_is_said(tiny_global_run, tmp_path, capsys):
    shutil.copytree(tiny_global_run, tmp_path / "run")
    run_on_folder(plot_run, tmp_path / "run", "--train_dir", tmp_path)  # no data set is needed for that
    assert [path.name for path in (tmp_path / "run" / "figures").iterdir()] == ["curves.png"]
    assert is_png(tmp_path / "run" / "figures" / "curves.png")
    assert "The method 'global' has no groups" in capsys.readouterr().out


def test_restart_removes_figures_of_the_run_it_throws_away(copied_run):
    (copied_run.folder / "figures").mkdir()
    (copied_run.folder / "figures" / "gain.png").write_bytes(b"old")
    run_script([*copied_run.arguments, "--restart"])
    assert not (copied_run.folder / "figures").exists()


@pytest.mark.parametrize("num_groups", [1, 12, 25])
def test_map_has_as_many_colours_as_groups(tmp_path, monkeypatch, num_groups):
    monkeypatch.setattr(run_figures, "MOST_POINTS", 60)  # fewer than users
    vectors = np.random.default_rng(0).normal(size=(80, 5))
    draw_map(tmp_path / "users.png", vectors, np.arange(80) % num_groups, num_groups)
    assert is_png(tmp_path / "users.png")
    assert len({tuple(colour) for colour in run_figures.group_colours(num_groups)}) == num_groups


# ---------------------------------------------------------------- sheets


def test_long_titles_end_in_an_ellipsis():
    assert cut_title("Tarro ceramic lamp") == "Tarro ceramic lamp"
    lines = cut_title("a very long title of many words " * 5, letters=12, lines=3).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 12 and lines[-1].endswith("…")
    assert all(len(line) <= 12 for line in cut_title("x" * 100, letters=12).splitlines())
    assert cut_title("tab\tand\x1bescape") == "tab and escape"


def test_image_that_cannot_be_read_becomes_a_grey_square(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    for name in ("broken.jpg", "missing.jpg"):
        assert np.unique(thumbnail(tmp_path / name, 20)).tolist() == [211]
    Image.new("RGB", (40, 10), (255, 0, 0)).save(tmp_path / "wide.png")
    pixels = thumbnail(tmp_path / "wide.png", 20)
    assert pixels.shape == (20, 20, 3)
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[10, 10].tolist() == [255, 0, 0]  # whole, on white


def test_titles_that_look_like_formulas_or_have_foreign_letters_are_drawn(tmp_path, recwarn):
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    tiles = [Tile(image, title, "1", framed=True) for title in ("lamp $5 or $\\bad{6}$", "灯 ランプ", "")]
    draw_sheet(tmp_path / "sheet.png", "heading $x_", [SheetRow("row $", tiles, 0.5), SheetRow("empty", [])])
    assert is_png(tmp_path / "sheet.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


# ---------------------------------------------------------------- attention


def test_tokens_are_merged_into_the_words_that_they_are_part_of():
    title = "Red  wool-mug, by Brisk"
    offsets = [(0, 0), (0, 3), (5, 9), (9, 10), (10, 13), (13, 14), (15, 17), (0, 0)]  # cut before the last word
    words, places = words_of_tokens(title, offsets)
    assert words == ["Red", "wool-mug,", "by"] and places.tolist() == [-1, 0, 1, 1, 1, 1, 2, -1]


def test_moved_attention_is_what_lies_elsewhere():
    before = np.array([[0.5, 0.25], [0.25, 0.0]])
    assert moved(before, before) == 0
    assert moved(np.array([[0.25, 0.25], [0.25, 0.25]]), before) == 0.25
    assert moved(np.array([[0.0, 0.0], [0.0, 1.0]]), before) == 1


@torch.no_grad()
def plain_attention(tiny_dataset, tiny_clip, adapter, item):
    """Shares of tokens and patches by transformers and peft alone: last layer, mean over heads, from the pooled position."""
    clip = CLIPModel.from_pretrained(tiny_clip, attn_implementation="eager")
    model = PeftModel.from_pretrained(clip, adapter).eval()
    image = Image.open(tiny_dataset.train_dir / "tiny_images" / f"B{item:03d}.jpg")
    inputs = AutoImageProcessor.from_pretrained(tiny_clip, use_fast=False)(image, return_tensors="pt")
    title = tiny_dataset.titles[item - 1] or "No description available."
    inputs |= AutoTokenizer.from_pretrained(tiny_clip)([title], truncation=True, max_length=16, return_tensors="pt")
    output = model(**inputs, output_attentions=True)
    tokens = output.text_model_output.attentions[-1][0].mean(0)[-1, 1:-1]  # from the end of text, to what lies between
    patches = output.vision_model_output.attentions[-1][0].mean(0)[0, 1:]
    return (tokens / tokens.sum()).numpy(), (patches / patches.sum()).numpy()


@pytest.mark.parametrize("item", [1, 5, 6])  # an ordinary title, none, and one that is cut
def test_attention_is_that_of_a_plain_clip_with_the_saved_adapter(tiny_run, tiny_dataset, tiny_clip, item):
    number, explanation = explain_item(tiny_run.folder, str(item), tiny_dataset.train_dir, "cpu")
    assert number == item and [view.label.split("\n")[0] for view in explanation.views] == [
        "global", "group 0", "group 1", "group 2",
    ]  # fmt: skip
    title = tiny_dataset.titles[item - 1] or "No description available."
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip)
    ids = tokenizer(title, truncation=True, max_length=16)["input_ids"][1:-1]
    pieces = [piece.replace("</w>", "") for piece in tokenizer.convert_ids_to_tokens(ids)]
    adapters = [tiny_run.folder / "global", *(tiny_run.folder / "personalized" / f"group_{group}" for group in range(3))]
    for view, folder in zip(explanation.views, adapters):
        tokens, patches = plain_attention(tiny_dataset, tiny_clip, folder / "adapter", item)
        words, left = [], list(zip(pieces, tokens))
        for word in explanation.words:  # tokens are eaten up word by word
            share, letters = 0.0, ""
            while left and len(letters) < len(word):
                piece, weight = left.pop(0)
                letters, share = letters + piece, share + weight
            assert word.lower().startswith(letters)
            words.append(share)
        assert not left
        assert view.words == pytest.approx(words, abs=1e-6) and view.words.sum() == pytest.approx(1)
        assert view.patches.ravel() == pytest.approx(patches, abs=1e-6) and view.patches.shape == (2, 2)
    assert np.ptp([view.words for view in explanation.views], axis=0).max() > 1e-4  # the groups do differ


def test_explanation_is_drawn_and_told(copied_run, tiny_dataset, capsys):
    before = tree(copied_run.folder)
    for name, number in (("B003", 3), ("6", 6)):
        run_on_folder(explain_script, copied_run.folder, "--train_dir", tiny_dataset.train_dir, "--item", name)
        assert is_png(copied_run.folder / "figures" / f"explain_item_{number}.png")
    assert set(tree(copied_run.folder)) - set(before) == {"figures/explain_item_3.png", "figures/explain_item_6.png"}
    output = capsys.readouterr().out
    assert "group 2" in output and all(word in output for word in tiny_dataset.titles[2].split())


@pytest.mark.parametrize("modality", ["image", "text"])
def test_run_of_one_modality_shows_what_it_looks_at(tiny_dataset, tiny_clip, tmp_path, modality):
    changes = {"modality": modality, "method": "global", "global_epochs": 1, "num_epochs": 1}
    run_script(tiny_arguments(tiny_dataset, tiny_clip, tmp_path, peft_type="ia3", **changes))
    (folder,) = tmp_path.iterdir()
    _, explanation = explain_item(folder, "1", tiny_dataset.train_dir, "cpu")
    (view,) = explanation.views
    assert (view.words is None, view.patches is None) == (modality == "image", modality == "text")
    run_on_folder(explain_script, folder, "--train_dir", tiny_dataset.train_dir, "--item", "1")
    assert is_png(folder / "figures" / "explain_item_1.png")


def test_words_after_an_end_of_text_within_a_title_are_none(tiny_dataset, tiny_clip, tmp_path):
    """CLIP pools the first one, and what follows it is never looked at."""
    titles = ["red lamp <|endoftext|> pale mug", *tiny_dataset.titles[1:]]
    dataset = SimpleNamespace(train_dir=write_dataset(tmp_path, "tiny", tiny_dataset.histories, titles), name="tiny")
    changes = {"method": "global", "global_epochs": 1, "num_epochs": 1}
    run_script(tiny_arguments(dataset, tiny_clip, tmp_path / "runs", **changes))
    (folder,) = (tmp_path / "runs").iterdir()
    _, explanation = explain_item(folder, "1", tmp_path, "cpu")
    assert explanation.words == ["red", "lamp"] and explanation.views[0].words.shape == (2,)
    run_on_folder(explain_script, folder, "--train_dir", tmp_path, "--item", "1")
    assert is_png(folder / "figures" / "explain_item_1.png")


@pytest.mark.parametrize("peft_type", ["iisan", "frozen", "none"])
def test_run_without_adapters_inside_clip_is_refused(copied_run, tiny_dataset, peft_type):
    path = copied_run.folder / "summary.json"
    summary = json.loads(path.read_text())
    summary["config"]["peft_type"] = peft_type
    path.write_text(json.dumps(summary))
    with pytest.raises(PerPEFTError, match=f"'{peft_type}', which leaves CLIP's attention as it is") as raised:
        run_on_folder(explain_script, copied_run.folder, "--train_dir", tiny_dataset.train_dir, "--item", "1")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["B031", "0", str(NUM_ITEMS + 1), "-1", "1.5", "²", "9" * 30])
def test_unknown_item_is_refused(tiny_run, tiny_dataset, name):
    with pytest.raises(PerPEFTError, match="is neither a raw id of tiny nor a number from 1 to 30") as raised:
        explain_item(tiny_run.folder, name, tiny_dataset.train_dir, "cpu")
    assert len(str(raised.value).splitlines()) == 1


def test_unfinished_run_and_damaged_adapter_are_refused(copied_run, tiny_dataset):
    (copied_run.folder / "personalized" / "group_2" / "adapter" / "adapter_model.safetensors").write_bytes(b"none")
    with pytest.raises(PerPEFTError, match="group_2 cannot be read"):
        explain_item(copied_run.folder, "1", tiny_dataset.train_dir, "cpu")
    (copied_run.folder / "summary.json").unlink()
    with pytest.raises(PerPEFTError, match="holds no finished run"):
        explain_item(copied_run.folder, "1", tiny_dataset.train_dir, "cpu")


def test_damaged_ranks_are_told(copied_run, tiny_dataset):
    (copied_run.folder / "personalized_ranks.csv").write_text("user,valid_rank,test_rank\n2,1\n")
    with pytest.raises(PerPEFTError, match="personalized_ranks.csv cannot be read"):
        run_on_folder(plot_run, copied_run.folder, "--train_dir", tiny_dataset.train_dir)


def test_the_map_of_vectors_one_number_wide_is_a_line(tmp_path):
    vectors = np.linspace(0, 1, 12)[:, None].astype(np.float32)
    draw_map(tmp_path / "map.png", vectors, np.arange(12) % 3, 3)
    assert Image.open(tmp_path / "map.png").format == "PNG"
