"""A whole run, from the command line to what it leaves: the documented files, figures that can be reproduced, clear refusals."""
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from models import SASRec
from tests.conftest import (
    NUM_ITEMS,
    can_train,
    run_script,
    tiny_arguments,
    tiny_histories,
    tiny_options,
    tiny_titles,
    write_dataset,
)
from utils.common.errors import PerPEFTError
from utils.items.foundation import load_foundation
from utils.run.opening import open_run
from utils.run.options import parse_options
from utils.training import progress
from utils.training.grouping import kmeans_groups
from utils.training.sampling import Sampler

ROOT = Path(__file__).parents[2]
METRICS = [f"{name}@{k}" for name in ("HR", "NDCG") for k in (10, 20, 30)]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rows_of(folder, stage):
    return [row for row in read_csv(folder / "metrics.csv") if row["stage"] == stage]


def tree(folder):
    """{relative path: bytes} of a folder's files."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(folder):
    """{file and tensor name: tensor} of all weights in a run folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".pth":
            tensors = torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            continue
        found.update({f"{path.relative_to(folder).as_posix()} {name}": tensor for name, tensor in tensors.items()})
    return found


def run_command(arguments, cwd, **environment):
    command = [sys.executable, str(ROOT / "perpeft_lora_ia3.py"), *map(str, arguments)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=600)


# ---------------------------------------------------------------- what a run leaves


def test_run_folder_holds_the_documented_files_and_nothing_else(tiny_run):
    adapter = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    expected = {"metrics.csv", "summary.json", "groups.csv", "curves.png", "groups.png"}
    expected |= {"global_ranks.csv", "personalized_ranks.csv"}
    expected |= {f"global/{name}" for name in ("sasrec.pth", "projector.pth", *adapter)} | {"personalized/sasrec.pth"}
    expected |= {f"personalized/group_{g}/{name}" for g in range(3) for name in ("projector.pth", *adapter)}
    assert set(tree(tiny_run.folder)) - {".lock"} == expected
    for name in ("curves.png", "groups.png"):
        with Image.open(tiny_run.folder / name) as image:
            assert min(image.size) > 100


def test_metrics_has_a_row_an_epoch_under_the_documented_columns(tiny_run):
    rows = read_csv(tiny_run.folder / "metrics.csv")
    columns = ["stage", "epoch", "train_loss", "seconds", *(f"{split}_{name}" for split in ("valid", "test") for name in METRICS)]
    assert list(rows[0]) == columns
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("global", "1"), ("global", "2"), ("personalized", "1"), ("personalized", "2"),
    ]  # fmt: skip
    losses = [float(row["train_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True) and 0 < losses[-1] < losses[0] < 4
    for row in rows:
        for split in ("valid", "test"):
            values = {name: float(row[f"{split}_{name}"]) for name in METRICS}
            assert all(0 <= value <= 1 for value in values.values())
            for kind in ("HR", "NDCG"):
                assert values[f"{kind}@10"] <= values[f"{kind}@20"] <= values[f"{kind}@30"]
            assert all(values[f"NDCG@{k}"] <= values[f"HR@{k}"] for k in (10, 20, 30))


def test_summary_describes_the_run(tiny_run, tiny_dataset, tiny_clip):
    summary = json.loads((tiny_run.folder / "summary.json").read_text())
    assert summary["config"].items() >= {
        "dataset": "tiny", "peft_type": "lora", "lr": 1e-3, "wdecay": 1e-4, "C": 3, "rank": 4, "trial": 0, "batch_size": 16,
        "maxlen": 10, "hidden_units": 32, "num_blocks": 2, "num_heads": 4, "dropout_rate": 0.3, "l2_emb": 1e-6,
        "weight_scalar": 0.5, "global_epochs": 2, "num_epochs": 2,
    }.items()  # fmt: skip
    assert summary["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0] and summary["device"] == "cpu"
    interactions = sum(map(len, tiny_dataset.histories.values()))
    evaluated = sum(len(items) >= 3 for items in tiny_dataset.histories.values())
    assert summary["dataset"] == {"users": 40, "items": 30, "interactions": interactions, "evaluated_users": evaluated}
    assert len(summary["group_sizes"]) == 3 and sum(summary["group_sizes"]) == 40
    counts = summary["trainable_parameters"]
    lora = 4 * 2 * 4 * (32 + 32)  # 2 + 2 layers, q and v, rank 4, A and B of width 32
    total = sum(parameter.numel() for parameter in CLIPModel.from_pretrained(tiny_clip).parameters())
    assert counts["adapter_of_one_group"] == lora and counts["adapters"] == 3 * lora
    assert counts["foundation_model"] == total and counts["adapter_share_of_foundation_model"] == pytest.approx(lora / total)
    assert counts["projectors"] == 3 * (32 * 64 + 64 + 2 * 64 + 64 * 32 + 32 + 2 * 32)
    assert set(summary["seconds"]) == {"global", "grouping", "personalized"} and min(summary["seconds"].values()) > 0
    for stage in ("global", "personalized"):
        assert set(summary[stage]) == {"best_epoch", "valid", "test"}
        assert set(summary[stage]["valid"]) == set(summary[stage]["test"]) == set(METRICS)


def test_groups_csv_names_every_real_user_once(tiny_run, tiny_dataset):
    rows = read_csv(tiny_run.folder / "groups.csv")
    assert list(rows[0]) == ["user", "group"]
    assert [int(row["user"]) for row in rows] == sorted(tiny_dataset.histories)
    sizes = [sum(row["group"] == str(group) for row in rows) for group in range(3)]
    assert sizes == json.loads((tiny_run.folder / "summary.json").read_text())["group_sizes"]


def test_personalized_weights_have_moved_apart(tiny_run, tiny_dataset):
    """The adapter and projector of every group with something to train on has trained, and on batches of its own."""
    rows = read_csv(tiny_run.folder / "groups.csv")
    trained = sorted({row["group"] for row in rows if can_train(tiny_dataset, int(row["user"]))})
    assert len(trained) > 1
    found = weights(tiny_run.folder)
    names = [name.removeprefix("global/") for name in found if name.startswith(("global/adapter", "global/projector"))]
    assert len(names) == 16 + 8
    for name in names:
        versions = [found[f"global/{name}"], *(found[f"personalized/group_{group}/{name}"] for group in trained)]
        for first in range(len(versions)):
            for second in range(first):
                assert not torch.equal(versions[first], versions[second]), name


@torch.no_grad()
def naive_metrics(tiny_run, tiny_dataset, tiny_clip, stage):
    """Valid and test metrics of the saved weights, with peft and transformers alone, user by user as DESIGN.md writes."""
    image_processor = AutoImageProcessor.from_pretrained(tiny_clip, use_fast=False)
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip)
    titles = [title or "No description available." for title in tiny_dataset.titles]
    images = [Image.open(tiny_dataset.train_dir / "tiny_images" / f"B{item:03d}.jpg") for item in range(1, NUM_ITEMS + 1)]
    inputs = image_processor(images, return_tensors="pt")
    inputs |= tokenizer(titles, padding=True, truncation=True, max_length=16, return_tensors="pt")

    folder = tiny_run.folder / stage
    sasrec = SASRec(NUM_ITEMS).eval()
    sasrec.load_state_dict(torch.load(folder / "sasrec.pth", weights_only=True))
    own = {0: folder} if stage == "global" else {group: folder / f"group_{group}" for group in range(3)}
    vectors = {}
    for group, path in own.items():
        clip = PeftModel.from_pretrained(CLIPModel.from_pretrained(tiny_clip), path / "adapter").eval()
        output = clip(**inputs)
        features = torch.cat([output.image_embeds, output.text_embeds], 1)
        projector = torch.load(path / "projector.pth", weights_only=True)
        x = torch.cat([torch.zeros(1, 32), features]) @ projector["projector.0.weight"].T + projector["projector.0.bias"]
        x = torch.layer_norm(x, (64,), projector["projector.1.weight"], projector["projector.1.bias"], 1e-8).relu()
        x = x @ projector["projector.3.weight"].T + projector["projector.3.bias"]
        last = projector["last_layernorm.weight"], projector["last_layernorm.bias"]
        vectors[group] = torch.layer_norm(x, (32,), *last, 1e-8)

    group_of = {int(row["user"]): int(row["group"]) for row in read_csv(tiny_run.folder / "groups.csv")}
    metrics = {}
    for split, held_out in (("valid", 2), ("test", 1)):
        ranks = []
        for user, items in tiny_dataset.histories.items():
            if len(items) < 3:
                continue
            P = vectors[0 if stage == "global" else group_of[user]]
            history, target = items[:-held_out], items[-held_out]
            state = sasrec.states(torch.tensor([([0] * 10 + history)[-10:]]), P)[0, -1]
            scores = (0.5 * P + sasrec.item_emb.weight) @ state
            others = [item for item in range(1, NUM_ITEMS + 1) if item != target and item not in history]
            ranks.append(sum(scores[item] >= scores[target] for item in others).item())
        for k in (10, 20, 30):
            metrics[f"{split} HR@{k}"] = np.mean([rank < k for rank in ranks])
            metrics[f"{split} NDCG@{k}"] = np.mean([1 / np.log2(rank + 2) if rank < k else 0 for rank in ranks])
    return metrics


@pytest.mark.parametrize("stage", ["global", "personalized"])
def test_reported_metrics_follow_from_the_saved_weights_without_this_projects_code(tiny_run, tiny_dataset, tiny_clip, stage):
    summary = json.loads((tiny_run.folder / "summary.json").read_text())[stage]
    reported = {f"{split} {name}": summary[split][name] for split in ("valid", "test") for name in METRICS}
    assert naive_metrics(tiny_run, tiny_dataset, tiny_clip, stage) == pytest.approx(reported, abs=1e-9)


@pytest.fixture(scope="module")
def hasty_run(tiny_dataset, tiny_clip, tmp_path_factory):
    """A run at a rate so high that its last epoch is not its best."""
    output_dir = tmp_path_factory.mktemp("hasty")
    run_script(tiny_arguments(tiny_dataset, tiny_clip, output_dir, lr=0.02, wdecay=0, global_epochs=6, num_epochs=6))
    return next(output_dir.iterdir())


def test_best_epoch_is_that_of_the_highest_valid_ndcg_20_and_test_figures_are_its_own(hasty_run):
    summary = json.loads((hasty_run / "summary.json").read_text())
    for stage in ("global", "personalized"):
        rows = rows_of(hasty_run, stage)
        values = [float(row["valid_NDCG@20"]) for row in rows]
        best = values.index(max(values))
        assert summary[stage]["best_epoch"] == best + 1
        for split in ("valid", "test"):
            assert summary[stage][split] == {name: float(rows[best][f"{split}_{name}"]) for name in METRICS}
    assert {summary[stage]["best_epoch"] for stage in ("global", "personalized")} != {6}  # otherwise this test shows little


# ---------------------------------------------------------------- figures can be reproduced


def test_inference_only_reproduces_the_reported_metrics_and_writes_nothing(hasty_run, tiny_dataset, tiny_clip, capsys):
    before = tree(hasty_run)
    changes = {"lr": 0.02, "wdecay": 0, "global_epochs": 6, "num_epochs": 6, "inference_only": True}
    arguments = tiny_arguments(tiny_dataset, tiny_clip, hasty_run.parent, **changes)
    with open_run(parse_options("", ("lora", "ia3"), arguments)) as run:
        found = run.evaluate_saved()
    summary = json.loads((hasty_run / "summary.json").read_text())
    for stage in ("global", "personalized"):
        assert found[stage]["best_epoch"] == summary[stage]["best_epoch"]
        for split in ("valid", "test"):
            assert found[stage][split] == pytest.approx(summary[stage][split], abs=1e-12)
    capsys.readouterr()
    run_script(arguments)
    table = capsys.readouterr().out
    for stage in ("global", "personalized"):
        for split in ("valid", "test"):
            line = next(line for line in table.splitlines() if split in line and (stage in line))
            assert [float(word) for word in line.split()[2:8]] == [round(100 * summary[stage][split][m], 2) for m in METRICS]
    assert tree(hasty_run) == before


def without_seconds(folder):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_csv(folder / "metrics.csv")]


def test_same_seed_has_the_same_figures_and_weights_and_another_seed_does_not(tiny_run, tiny_dataset, tiny_clip, tmp_path):
    torch.randn(5)  # other draws of the process do not matter
    run_script(tiny_arguments(tiny_dataset, tiny_clip, tmp_path))
    run_script(tiny_arguments(tiny_dataset, tiny_clip, tmp_path, trial=1))
    again, other = tmp_path / tiny_run.folder.name, tmp_path / tiny_run.folder.name.replace("seed0", "seed1")
    assert without_seconds(again) == without_seconds(tiny_run.folder)
    assert (again / "groups.csv").read_text() == (tiny_run.folder / "groups.csv").read_text()
    first, second, third = weights(tiny_run.folder), weights(again), weights(other)
    assert set(first) == set(second) == set(third)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert without_seconds(other) != without_seconds(tiny_run.folder)
    assert not torch.equal(first["global/sasrec.pth item_emb.weight"], third["global/sasrec.pth item_emb.weight"])


def test_personalized_stage_starts_from_the_best_global_weights_for_every_group(tiny_dataset, tiny_clip, tmp_path):
    """At a vanishing rate nothing is learned, so any figure that changed would mean another start."""
    run_script(tiny_arguments(tiny_dataset, tiny_clip, tmp_path, lr=1e-12, wdecay=0))
    rows = without_seconds(next(tmp_path.iterdir()))
    figures = [{name: value for name, value in row.items() if "@" in name} for row in rows]
    assert figures[0] == figures[1] == figures[2] == figures[3]


def test_stage_1_ends_with_the_weights_of_its_best_epoch(tiny_dataset, tiny_clip, tmp_path):
    options = tiny_options(tiny_dataset, tiny_clip, tmp_path, lr=0.02, wdecay=0, global_epochs=6)
    with open_run(options) as run:
        run.train_global()
        folder = run.folder / "global"
        values = [float(row["valid_NDCG@20"]) for row in rows_of(run.folder, "global")]
        assert max(values) > values[-1]  # else the last epoch would do as well
        assert run.evaluate().metrics()["valid_NDCG@20"] == pytest.approx(max(values), abs=1e-12)
        for part, module in (("sasrec", run.model.sasrec), ("projector", run.model.projectors[0])):
            saved = torch.load(folder / f"{part}.pth", weights_only=True)
            assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())


def test_negatives_are_drawn_from_all_items_first_and_then_from_the_groups_training_items(
    tiny_dataset, tiny_clip, tmp_path, monkeypatch
):
    samplers = []

    class Remembering(Sampler):
        def __init__(self, train, num_items, groups, candidates, batch_size, maxlen, seed, mixed):
            samplers.append((groups.tolist(), [items.tolist() for items in candidates], batch_size, maxlen))
            assert not mixed
            super().__init__(train, num_items, groups, candidates, batch_size, maxlen, seed)

    monkeypatch.setattr("utils.run.run.Sampler", Remembering)
    run_script(tiny_arguments(tiny_dataset, tiny_clip, tmp_path, global_epochs=1, num_epochs=1))
    groups = {int(row["user"]): int(row["group"]) for row in read_csv(next(tmp_path.iterdir()) / "groups.csv")}
    train = {user: items[:-2] if len(items) >= 3 else items for user, items in tiny_dataset.histories.items()}
    of_group = [sorted({item for user in train if groups[user] == g for item in train[user]}) for g in range(3)]
    assert samplers[0] == ([0] * 40, [list(range(1, NUM_ITEMS + 1))], 16, 10)
    assert samplers[1] == ([groups[user] for user in sorted(groups)], of_group, 16, 10)
    assert min(map(len, of_group)) < NUM_ITEMS  # else the groups would not show


@pytest.mark.parametrize(("peft_type", "C"), [("ia3", 3), ("ia3", 1), ("lora", 12)])
def test_other_adapters_and_group_counts_work_from_end_to_end(tiny_dataset, tiny_clip, tmp_path, peft_type, C):
    arguments = tiny_arguments(tiny_dataset, tiny_clip, tmp_path, peft_type, C=C, global_epochs=1, num_epochs=1)
    run_script(arguments)
    folder = tmp_path / f"tiny_{peft_type}_lr0.001_wd0.0001_seed0"
    assert [row["stage"] for row in read_csv(folder / "metrics.csv")] == ["global", "personalized"]
    assert {path.name for path in (folder / "personalized").iterdir()} == {"sasrec.pth", *(f"group_{g}" for g in range(C))}
    summary = json.loads((folder / "summary.json").read_text())
    per_layer = {"lora": 2 * 4 * (32 + 32), "ia3": 3 * 32}[peft_type]
    assert summary["trainable_parameters"]["adapters"] == C * 4 * per_layer
    clip = CLIPModel.from_pretrained(tiny_clip)
    opened = PeftModel.from_pretrained(clip, folder / "personalized" / f"group_{C - 1}" / "adapter")
    assert opened.peft_config["default"].peft_type == peft_type.upper()
    with open_run(parse_options("", ("lora", "ia3"), [*arguments, "--inference_only"])) as run:
        found = run.evaluate_saved()
    assert found["personalized"]["test"] == pytest.approx(summary["personalized"]["test"], abs=1e-12)


# ---------------------------------------------------------------- a folder that is there already


def test_finished_run_is_not_trained_again(copied_run, capsys):
    before = tree(copied_run.folder)
    run_script(copied_run.arguments)
    assert tree(copied_run.folder) == before
    output = capsys.readouterr().out
    assert "finished" in output and "--restart" in output
    test_ndcg = json.loads(before["summary.json"])["personalized"]["test"]["NDCG@20"]
    assert f"{100 * test_ndcg:.2f}" in output  # its table is shown again


def test_restart_trains_again(copied_run, tiny_run):
    before = tree(copied_run.folder)
    groups = copied_run.folder / "groups.csv"
    groups.write_text(groups.read_text().replace(",1", ",0"))  # would make another stage 3, were it taken over
    (copied_run.folder / "global" / "sasrec.pth").unlink()
    shutil.copytree(copied_run.folder / "personalized" / "group_2", copied_run.folder / "personalized" / "group_3")
    run_script([*copied_run.arguments, "--restart"])
    after = tree(copied_run.folder)
    assert set(after) == set(before)
    assert after["groups.csv"] == before["groups.csv"]
    assert without_seconds(copied_run.folder) == without_seconds(tiny_run.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--num_epochs", "3"], "num_epochs was 2, is now 3"),
        (["--C", "4"], "C was 3, is now 4"),
        (["--dropout_rate", "0.1", "--maxlen", "7"], "dropout_rate was 0.3, is now 0.1; maxlen was 10, is now 7"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--inference_only"]])
def test_other_settings_in_the_same_folder_are_refused_and_named(copied_run, change, message, more):
    before = tree(copied_run.folder)
    with pytest.raises(PerPEFTError, match=message):
        run_script([*copied_run.arguments, *change, *more])
    assert tree(copied_run.folder) == before


def test_other_data_under_the_same_name_is_refused(copied_run, tiny_dataset, tmp_path):
    histories = tiny_histories()
    histories[2] = histories[2][::-1]
    folder = write_dataset(tmp_path / "other", "tiny", histories, tiny_titles())
    before = tree(copied_run.folder)
    with pytest.raises(PerPEFTError, match="data"):
        run_script([*copied_run.arguments, "--train_dir", str(folder)])
    assert tree(copied_run.folder) == before


def test_restart_that_cannot_start_does_not_throw_the_finished_run_away(copied_run, tmp_path):
    before = tree(copied_run.folder)
    with pytest.raises(PerPEFTError):
        run_script([*copied_run.arguments, "--restart", "--clip_model", str(tmp_path)])
    assert {name: data for name, data in tree(copied_run.folder).items() if name in before} == before


def test_inference_only_without_a_finished_run_is_reported(tiny_dataset, tiny_clip, tmp_path, monkeypatch):
    arguments = tiny_arguments(tiny_dataset, tiny_clip, tmp_path, inference_only=True)
    with pytest.raises(PerPEFTError, match="without --inference_only"):
        run_script(arguments)

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("utils.run.run.Run.group_users", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_script(arguments[:-1])
    with pytest.raises(PerPEFTError):  # stage 1 is done, but there are no groups yet
        run_script(arguments)


@pytest.mark.parametrize("damage", ["a line less", "a group too high", "empty", "missing"])
def test_damaged_groups_csv_is_reported(copied_run, damage):
    path = copied_run.folder / "groups.csv"
    lines = path.read_text().splitlines(keepends=True)
    if damage == "missing":
        path.unlink()
    else:
        changed = {"a line less": lines[:-1], "a group too high": [*lines[:-1], lines[-1].split(",")[0] + ",7\n"], "empty": []}
        path.write_text("".join(changed[damage]))
    with pytest.raises(PerPEFTError, match="groups.csv"):
        run_script([*copied_run.arguments, "--inference_only"])


# ---------------------------------------------------------------- grouping


def blobs(seed=0):
    random = np.random.default_rng(seed)
    centres = random.normal(0, 10, (4, 6))
    truth = random.integers(0, 4, 200)
    return (centres[truth] + random.normal(0, 0.1, (200, 6))).astype(np.float32), truth


def test_kmeans_finds_clear_groups_and_the_same_ones_each_time():
    vectors, truth = blobs()
    groups = kmeans_groups(vectors, 4, seed=0)
    assert groups.tolist() == kmeans_groups(vectors, 4, seed=0).tolist()
    assert sorted(set(groups.tolist())) == [0, 1, 2, 3]
    assert len(set(zip(groups.tolist(), truth.tolist()))) == 4  # every group is one blob


def test_as_many_groups_as_users():
    assert set(kmeans_groups(np.eye(8, dtype=np.float32), 8, seed=0).tolist()) == set(range(8))


def groups_of(folder, tiny_clip, output_dir):
    options = parse_options("", ("lora", "ia3"), [
        "--dataset", "tiny", "--train_dir", str(folder), "--clip_model", str(tiny_clip), "--output_dir", str(output_dir),
        "--device", "cpu", "--C", "3",
    ])  # fmt: skip
    with open_run(options) as run:
        run.group_users()
    return (next(output_dir.iterdir()) / "groups.csv").read_text()


def test_groups_follow_train_and_valid_interactions_and_never_the_test_item(tiny_dataset, tiny_clip, tmp_path):
    def changed(place):
        histories = {}
        for user, items in tiny_histories().items():
            items = list(items)
            if len(items) >= 3:
                items[place] = items[place] % NUM_ITEMS + 1
            histories[user] = items
        return histories

    texts = {}
    for name, histories in (("same", tiny_histories()), ("test", changed(-1)), ("valid", changed(-2))):
        folder = write_dataset(tmp_path / name, "tiny", histories, tiny_titles())
        texts[name] = groups_of(folder, tiny_clip, tmp_path / f"runs_{name}")
    assert texts["test"] == texts["same"]
    assert texts["valid"] != texts["same"]


# ---------------------------------------------------------------- mistakes at the command line


def one_clear_sentence(outcome):
    """The message of a run that ended with code 2 and one line of error, without a traceback."""
    assert outcome.returncode == 2, outcome.stderr[-500:]
    assert "Traceback" not in outcome.stderr
    lines = outcome.stderr.strip().splitlines()
    assert [number for number, line in enumerate(lines, 1) if line.startswith("error: ")] == [len(lines)], outcome.stderr
    return lines[-1]


def test_readmes_command_without_the_data_set_says_what_to_do(tmp_path):
    command = "python3 perpeft_lora_ia3.py --dataset sports_outdoors --device cuda:0 --peft_type lora --wdecay 1e-4 --lr 1e-4"
    outcome = run_command(command.split()[2:], tmp_path)
    message = one_clear_sentence(outcome)
    assert outcome.stderr.count("\n") == 1
    assert "sports_outdoors_final.txt" in message and "unzip_data.py" in message
    assert list(tmp_path.iterdir()) == []


def test_missing_clip_weights_say_what_to_do(tiny_dataset, tmp_path):
    arguments = ["--dataset", "tiny", "--train_dir", tiny_dataset.train_dir, "--output_dir", tmp_path / "runs", "--device", "cpu"]
    message = one_clear_sentence(run_command(arguments, tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache")))
    assert "openai/clip-vit-base-patch32" in message and "--clip_model" in message and "network" in message


def test_help_groups_options_and_shows_the_papers_defaults_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as raised:
        parse_options("PerPEFT", ("lora", "ia3"), ["--help"])
    text = capsys.readouterr().out
    assert raised.value.code == 0
    for option in (
        "dataset", "device", "wdecay", "lr", "peft_type", "train_dir", "clip_model", "batch_size", "maxlen", "hidden_units",
        "num_blocks", "num_heads", "dropout_rate", "l2_emb", "weight_scalar", "rank", "C", "global_epochs", "num_epochs",
        "trial", "output_dir", "restart", "inference_only",
    ):  # fmt: skip
        assert f"--{option} " in text
    for default in ("./dataset", "./runs", "openai/clip-vit-base-patch32", "1e-06", "0.3"):
        assert f"default: {default}" in text
    assert "(default: None)" not in text
    assert all(line.count("default:") <= 1 for line in text.splitlines())


def test_defaults_are_the_papers():
    options = parse_options("", ("lora", "ia3"), ["--dataset", "sports_outdoors"])
    expected = {
        "hidden_units": 32, "num_blocks": 2, "num_heads": 4, "maxlen": 10, "dropout_rate": 0.3, "weight_scalar": 0.5, "rank": 4,
        "batch_size": 16, "global_epochs": 10, "num_epochs": 20, "C": 8, "l2_emb": 1e-6, "lr": 1e-4, "wdecay": 1e-4, "trial": 0,
        "clip_model": "openai/clip-vit-base-patch32", "train_dir": "./dataset", "output_dir": "./runs",
        "method": "perpeft", "modality": "both", "negatives": "group", "grouping": "kmeans",
    }  # fmt: skip
    assert {name: getattr(options, name) for name in expected} == expected


def test_rate_and_decay_come_from_the_pickle_where_they_are_not_given():
    def settings(*arguments):
        options = parse_options("", ("lora", "ia3"), list(arguments))
        return options.lr, options.wdecay

    assert settings("--dataset", "toys_games", "--peft_type", "lora") == (1e-4, 5e-5)
    assert settings("--dataset", "arts", "--peft_type", "ia3") == (1e-4, 5e-5)
    assert settings("--dataset", "beauty_care", "--peft_type", "ia3") == (1e-4, 1e-5)
    assert settings("--dataset", "beauty_care", "--peft_type", "lora", "--lr", "3e-4") == (3e-4, 1e-5)
    assert settings("--dataset", "beauty_care", "--peft_type", "lora", "--wdecay", "0") == (1e-4, 0)
    assert settings("--dataset", "grocery") == (1e-4, 1e-4)


# ---------------------------------------------------------------- CLIP folders that are none


def test_folder_whose_weights_lack_a_part_is_refused(tmp_path, tiny_clip):
    """transformers would only warn, and draw the missing part at random."""
    shutil.copytree(tiny_clip, tmp_path / "clip")
    path = tmp_path / "clip" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != "visual_projection.weight"}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PerPEFTError, match="clip"):
        load_foundation(str(tmp_path / "clip"))


def test_true_groups_that_come_with_drawn_data_are_compared_with_those_found(copied_run, tiny_dataset, tmp_path, capsys):
    found = {int(user): group for user, group in (line.split(",") for line in read_lines(copied_run.folder / "groups.csv")[1:])}
    folder = tmp_path / "dataset"
    shutil.copytree(tiny_dataset.train_dir, folder)
    renamed = "".join(f"{user},{'zxy'[int(group)]}\n" for user, group in found.items())  # the same groups by other names
    (folder / "tiny_true_groups.csv").write_text("user,group\n" + renamed)
    arguments = list(copied_run.arguments)
    arguments[arguments.index("--train_dir") + 1] = str(folder)
    run_script([*arguments, "--restart"])
    assert "adjusted Rand index to the true groups 1.00" in capsys.readouterr().out


def read_lines(path):
    return path.read_text().splitlines()


def test_bar_of_an_epoch_shows_loss_items_a_second_and_time_left_and_is_quiet_without_a_terminal(
    tiny_dataset, tiny_clip, tmp_path, monkeypatch, capsys
):
    shown = io.StringIO()

    def bar_on_a_terminal(**options):
        return tqdm(**{**options, "disable": False, "file": shown, "mininterval": 0})

    short = {"batch_size": 1, "global_epochs": 1, "num_epochs": 1, "method": "none"}
    quiet = tiny_arguments(tiny_dataset, tiny_clip, tmp_path / "quiet", **short)
    run_script(quiet)
    assert "items/s" not in "".join(capsys.readouterr())
    monkeypatch.setattr(progress, "tqdm", bar_on_a_terminal)
    run_script([*quiet, "--restart"])
    # as in "global 1/2: 54%|#####4    | 20/37 [00:00<00:00, 150.2step/s, loss 2.7726, 1520 items/s]"
    assert re.search(r"global 1/2: .*\[\d\d:\d\d<\d\d:\d\d.*loss \d\.\d{4}, [1-9]\d* items/s\]", shown.getvalue())
