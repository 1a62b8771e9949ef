"""Every fast path has the results of the plain way: a whole tiny run is trained again with one fast path replaced."""
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer

import perpeft_iisan
from models import IISAN
from tests.conftest import iisan_arguments, run_script, tiny_arguments
from tests.run.test_pipeline import read_csv
from utils.analysis.baselines import plain_ranking_loop
from utils.items.store import ImageTitleStore
from utils.training import evaluation, sampling

CPU = torch.device("cpu")


def encode_one_by_one(evaluator, model, group):
    """All items' e_i, an item at a time in the order of their numbers."""
    source = evaluator.source
    with torch.no_grad():
        rows = [model.item_vectors(group, source.fetch(np.array([item]), CPU)) for item in range(1, source.num_items + 1)]
        return model.sasrec.item_inputs(torch.stack([rows[0][0], *(row[1] for row in rows)]))


def contained_by_lists(self, users, items):
    """InteractionIndex.contains, by a search through each user's history."""
    pairs = zip(np.ravel(users).tolist(), np.ravel(items).tolist())
    found = [item in self.items_of(user).tolist() for user, item in pairs]
    return np.array(found, dtype=bool).reshape(np.shape(users))


def decoded_in_every_step(tiny_dataset, tiny_clip):
    """ImageTitleStore.fetch, by CLIP's own processors from the files, titles padded to the longest there may be."""
    processor, tokenizer = AutoImageProcessor.from_pretrained(tiny_clip, use_fast=False), AutoTokenizer.from_pretrained(tiny_clip)

    def fetch(_, items, device):
        paths = [tiny_dataset.train_dir / "tiny_images" / f"B{item:03d}.jpg" for item in items]
        pixels = processor([Image.open(path) for path in paths], do_rescale=False, do_normalize=False, return_tensors="pt")
        titles = [tiny_dataset.titles[item - 1] or "No description available." for item in items]
        tokens = tokenizer(titles, truncation=True, max_length=16, padding="max_length", return_tensors="pt")
        return pixels["pixel_values"].to(torch.uint8), tokens["input_ids"]

    return fetch


def iisan_layer_by_layer(self, image_states, text_states):
    """IISAN.forward as the paper writes it."""
    w = torch.sigmoid(self.weight_scalar)
    text = image = joint = None
    for i in range(self.num_states):
        t, v = text_states[:, i], image_states[:, i]
        both = w[2, i] * t + (1 - w[2, i]) * (v @ self.CombProj.weight[i].T + self.CombProj.bias[i])
        text = t if i == 0 else w[0, i] * text + (1 - w[0, i]) * t
        image = v if i == 0 else w[1, i] * image + (1 - w[1, i]) * v
        joint = both if i == 0 else both + joint
        text, image = self.TextBlocks[i](text) + text, self.ImgBlocks[i](image) + image
        joint = self.InterBlocks[i](joint) + joint
    return torch.cat([text, image, joint], dim=-1)


def assert_same_figures(found, expected):
    """Losses but for rounding; metrics, which are counts of users, exactly."""
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected):
        assert (ours["stage"], ours["epoch"]) == (theirs["stage"], theirs["epoch"])
        assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=1e-5)
        for name in ours.keys() - {"stage", "epoch", "train_loss", "seconds"}:
            assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-12), name


@pytest.mark.parametrize("path", ["encoding", "ranking", "negatives", "store"])
def test_a_lora_run_without_the_short_cut(path, tiny_run, tiny_dataset, tiny_clip, tmp_path, monkeypatch):
    calls = []
    where, name, plain = {
        "encoding": (evaluation.Evaluator, "item_table", encode_one_by_one),
        "ranking": (evaluation, "rank_targets", lambda *arguments: torch.from_numpy(plain_ranking_loop(*arguments))),
        "negatives": (sampling.InteractionIndex, "contains", contained_by_lists),
        "store": (ImageTitleStore, "fetch", decoded_in_every_step(tiny_dataset, tiny_clip)),
    }[path]

    def counted(*arguments, **options):
        calls.append(path)
        return plain(*arguments, **options)

    monkeypatch.setattr(where, name, counted)
    run_script(tiny_arguments(tiny_dataset, tiny_clip, tmp_path))
    (folder,) = tmp_path.iterdir()
    assert calls  # the plain way was taken
    assert_same_figures(read_csv(folder / "metrics.csv"), read_csv(tiny_run.folder / "metrics.csv"))


def test_an_iisan_run_without_batched_layers(tiny_dataset, tiny_clip, tmp_path, monkeypatch):
    def run(name):
        perpeft_iisan.main(iisan_arguments(tiny_dataset, tiny_clip, tmp_path / name))
        (folder,) = (tmp_path / name).iterdir()
        return read_csv(folder / "metrics.csv")

    expected = run("ours")
    monkeypatch.setattr(IISAN, "forward", iisan_layer_by_layer)
    assert_same_figures(run("plain"), expected)
