"""A whole run, from the command line to what it leaves: the documented files, figures that can be reproduced, clear refusals."""
import io
import itertools
import re
import shutil
from collections import defaultdict
from unittest import mock

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPModel

from tests.conftest import NUM_ITEMS, RUN, can_train, parsed, run_interrupted, tiny_histories, tiny_titles, write_dataset
from tests.plain import plain_model, plain_ranks
from tests.run_files import groups_of, outcome, ranks_of, read_csv, rows_of, summary_of, tree, without_seconds
from tests.zygote import start
from utils.common.errors import PerPEFTError
from utils.items.foundation import load_foundation
from utils.run.opening import open_run
from utils.training import progress
from utils.training.sampling import Sampler

PLOTS = ("curves.png", "groups.png")
METRICS = [f"{name}@{k}" for name in ("HR", "NDCG") for k in (10, 20, 30)]


def weights(folder):
    """{file and tensor name: tensor} of all weights in a run folder."""
    found = {path: torch.load(path, weights_only=True) for path in folder.rglob("*.pth")}
    found |= {path: load_file(path) for path in folder.rglob("*.safetensors")}
    return {f"{path.relative_to(folder)} {name}": tensor for path, tensors in found.items() for name, tensor in tensors.items()}


def test_run_folder_holds_the_documented_files_and_nothing_else_and_metrics_a_row_an_epoch(tiny_run):
    adapter = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    expected = {"metrics.csv", "summary.json", "groups.csv", "global_ranks.csv", "personalized_ranks.csv", *PLOTS}
    expected |= {f"global/{name}" for name in ("sasrec.pth", "projector.pth", *adapter)} | {"personalized/sasrec.pth"}
    expected |= {f"personalized/group_{g}/{name}" for g in range(3) for name in ("projector.pth", *adapter)}
    assert set(tree(tiny_run.folder)) - {".lock"} == expected
    for name in PLOTS:
        with Image.open(tiny_run.folder / name) as image:
            assert min(image.size) > 100
    rows = read_csv(tiny_run.folder / "metrics.csv")
    columns = ["stage", "epoch", "train_loss", "seconds", *(f"{split}_{name}" for split in ("valid", "test") for name in METRICS)]
    assert list(rows[0]) == columns
    assert [row["stage"] + row["epoch"] for row in rows] == ["global1", "global2", "personalized1", "personalized2"]
    losses = [float(row["train_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True) and 0 < losses[-1] < losses[0] < 4


def test_summary_describes_the_run(tiny_run, tiny_dataset, tiny_clip):
    summary = summary_of(tiny_run.folder)
    names = "dataset peft_type lr wdecay C rank trial batch_size maxlen hidden_units num_blocks num_heads dropout_rate l2_emb"
    for name in (*names.split(), "weight_scalar", "global_epochs", "num_epochs"):
        assert summary["config"][name] == getattr(tiny_run.options, name)
    assert summary["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0] and summary["device"] == "cpu"
    interactions = sum(map(len, tiny_dataset.histories.values()))
    evaluated = sum(len(items) >= 3 for items in tiny_dataset.histories.values())
    assert summary["dataset"] == {"users": 40, "items": 30, "interactions": interactions, "evaluated_users": evaluated}
    groups = groups_of(tiny_run.folder)
    assert list(groups) == sorted(tiny_dataset.histories)  # every real user
    assert summary["group_sizes"] == [list(groups.values()).count(group) for group in range(3)]
    counts = summary["trainable_parameters"]
    lora = 4 * 2 * 4 * (32 + 32)  # 2 + 2 layers, q and v, rank 4, A and B of width 32
    total = sum(parameter.numel() for parameter in CLIPModel.from_pretrained(tiny_clip).parameters())
    assert counts["adapter_of_one_group"] == lora and counts["adapters"] == 3 * lora
    assert counts["foundation_model"] == total and counts["adapter_share_of_foundation_model"] == pytest.approx(lora / total)
    assert counts["projectors"] == 3 * (32 * 64 + 64 + 2 * 64 + 64 * 32 + 32 + 2 * 32)
    assert set(summary["seconds"]) == {"global", "grouping", "personalized"} and min(summary["seconds"].values()) > 0


def test_personalized_weights_have_moved_apart(tiny_run, tiny_dataset):
    """The adapter and projector of every group with something to train on has trained, and on batches of its own."""
    trained = sorted({group for user, group in groups_of(tiny_run.folder).items() if can_train(tiny_dataset, user)})
    assert len(trained) > 1
    found = weights(tiny_run.folder)
    names = [name.removeprefix("global/") for name in found if name.startswith(("global/adapter", "global/projector"))]
    assert len(names) == 16 + 8
    for name in names:
        versions = [found[f"global/{name}"], *(found[f"personalized/group_{group}/{name}"] for group in trained)]
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(versions, 2)), name


@pytest.mark.parametrize("stage", ["global", "personalized"])
def test_reported_metrics_follow_from_the_saved_weights_without_this_projects_code(tiny_run, tiny_dataset, tiny_clip, stage):
    folder = tiny_run.folder / stage
    places = {g: folder / f"group_{g}" for g in range(3)} if stage == "personalized" else {0: folder}
    models = {group: plain_model(folder, where, tiny_dataset, tiny_clip) for group, where in places.items()}
    groups = groups_of(tiny_run.folder) if stage == "personalized" else defaultdict(int)
    ranks = plain_ranks(lambda user: models[groups[user]], tiny_dataset.histories)
    summary = summary_of(tiny_run.folder)[stage]
    for place, split in enumerate(("valid", "test")):
        found = {user: both[place] for user, both in ranks.items()}
        assert ranks_of(tiny_run.folder, stage, split) == found
        for k in (10, 20, 30):
            assert summary[split][f"HR@{k}"] == pytest.approx(np.mean([rank < k for rank in found.values()]), abs=1e-9)
            gains = [1 / np.log2(rank + 2) if rank < k else 0 for rank in found.values()]
            assert summary[split][f"NDCG@{k}"] == pytest.approx(np.mean(gains), abs=1e-9)


def test_figures_are_those_of_the_epoch_best_by_valid_ndcg_20_and_come_again_by_inference_only(begin, capsys):
    run = begin(lr=0.02, wdecay=0, global_epochs=6, num_epochs=6)  # a rate so high that the last epoch is not the best
    run.train()
    before, summary = tree(run.folder), summary_of(run.folder)
    capsys.readouterr()
    run.train("--inference_only")
    assert tree(run.folder) == before
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    for stage in ("global", "personalized"):
        rows = rows_of(run.folder, stage)
        values = [float(row["valid_NDCG@20"]) for row in rows]
        best = values.index(max(values))
        assert summary[stage]["best_epoch"] == best + 1
        for split in ("valid", "test"):
            figures = {name: float(rows[best][f"{split}_{name}"]) for name in METRICS}
            assert summary[stage][split] == figures
            (words,) = [line[2:] for line in table if line[:2] == [stage, split]]
            assert list(map(float, words)) == [*(round(100 * value, 2) for value in figures.values()), best + 1]
    assert {summary[stage]["best_epoch"] for stage in ("global", "personalized")} != {6}  # otherwise this test shows little


def test_another_seed_has_other_figures_and_weights(tiny_run, begin):
    other = begin(trial=1)
    assert other.folder.name == tiny_run.folder.name.replace("seed0", "seed1")
    assert other.train()["metrics.csv"] != without_seconds(tiny_run.folder)
    first, second = weights(tiny_run.folder), weights(other.folder)
    assert not any(torch.equal(first[name], second[name]) for name in first if "item_emb" in name or "lora" in name)


def test_personalized_stage_starts_from_the_global_weights_for_every_group(begin):
    """At a vanishing rate nothing is learned, so any figure that changed would mean another start."""
    rows = begin(lr=1e-12, wdecay=0).train()["metrics.csv"]
    figures = [{name: value for name, value in row.items() if "@" in name} for row in rows]
    assert figures[0] == figures[1] == figures[2] == figures[3]


@pytest.mark.parametrize("negatives", ["group", "all", "mixed"])
def test_negatives_are_drawn_from_all_items_first_and_then_as_the_option_says(begin, tiny_dataset, negatives):
    run = begin(negatives=negatives, global_epochs=1, num_epochs=1)
    assert run.folder.name == RUN.format("lora" if negatives == "group" else f"lora_negatives_{negatives}")
    with mock.patch("utils.run.run.Sampler", wraps=Sampler) as made:
        run.train()
    groups = groups_of(run.folder)
    train = {user: items[:-2] if len(items) >= 3 else items for user, items in tiny_dataset.histories.items()}
    of_group = [sorted({item for user in train if groups[user] == g for item in train[user]}) for g in range(3)]
    everything = list(range(1, NUM_ITEMS + 1))
    assert min(map(len, of_group)) < NUM_ITEMS  # else the groups would not show
    of_stage_3 = [everything] * 3 if negatives == "all" else of_group
    expected = ([0] * 40, [everything], False), ([groups[user] for user in sorted(groups)], of_stage_3, negatives == "mixed")
    for call, (its_groups, candidates, mixed) in zip(made.call_args_list, expected, strict=True):
        assert call.args[2].tolist() == its_groups and call.args[4:] == (16, 10) and call.kwargs["mixed"] == mixed
        assert [items.tolist() for items in call.args[3]] == candidates


@pytest.mark.parametrize(("peft_type", "C"), [("ia3", 3), ("ia3", 1), ("lora", 12)])
def test_other_adapters_and_group_counts_work_from_end_to_end(begin, tiny_clip, peft_type, C):
    run = begin(kind=peft_type, C=C, global_epochs=1, num_epochs=1)
    run.train()
    own = run.folder / "personalized"
    assert {path.name for path in own.iterdir()} == {"sasrec.pth", *(f"group_{g}" for g in range(C))}
    summary = summary_of(run.folder)
    per_layer = {"lora": 2 * 4 * (32 + 32), "ia3": 3 * 32}[peft_type]
    assert summary["trainable_parameters"]["adapters"] == C * 4 * per_layer
    opened = PeftModel.from_pretrained(CLIPModel.from_pretrained(tiny_clip), own / f"group_{C - 1}" / "adapter")
    assert opened.peft_config["default"].peft_type == peft_type.upper()
    with open_run(parsed([*run.arguments, "--inference_only"])) as opened_again:
        found = opened_again.evaluate_saved()
    assert found["personalized"]["test"] == pytest.approx(summary["personalized"]["test"], abs=1e-12)


def test_groups_follow_train_and_valid_interactions_and_never_the_test_item(begin):
    groups = []
    for changed in (None, -1, -2):  # nothing, each user's test item, each user's valid item
        histories = tiny_histories()
        for items in histories.values():
            if changed and len(items) >= 3:
                items[changed] = items[changed] % NUM_ITEMS + 1
        run = begin(f"run{changed}")
        write_dataset(run.train_dir, "tiny", histories, tiny_titles(), draw=False)
        with open_run(parsed(run.arguments)) as opened:  # without any training before
            opened.group_users()
        groups.append(groups_of(run.folder))
    assert groups[0] == groups[1] != groups[2]


def test_true_groups_that_come_with_drawn_data_are_compared_with_those_found(finished, capsys):
    found = groups_of(finished.folder)
    renamed = "".join(f"{user},{'zxy'[group]}\n" for user, group in found.items())  # the same groups by other names
    (finished.train_dir / "tiny_true_groups.csv").write_text("user,group\n" + renamed)
    finished.train("--restart")
    assert "adjusted Rand index to the true groups 1.00" in capsys.readouterr().out


def test_finished_run_is_not_trained_again(finished, capsys):
    before = tree(finished.folder)
    (finished.folder / "resume").mkdir()
    (finished.folder / "resume" / "global.pt").write_bytes(b"left by a kill right after the summary")
    finished.train()
    assert tree(finished.folder) == before
    output = capsys.readouterr().out
    assert "finished" in output and "--restart" in output


def test_restart_trains_again_to_the_same_and_removes_only_what_runs_leave(finished, tiny_run):
    torch.randn(5)  # other draws of the process do not matter
    folder, groups = finished.folder, finished.folder / "groups.csv"
    groups.write_text(groups.read_text().replace(",1", ",0"))  # would make another stage 3, were it taken over
    (folder / "global" / "sasrec.pth").unlink()
    shutil.copytree(folder / "personalized" / "group_2", folder / "personalized" / "group_3")
    for name in ("mine", "tensorboard", "wandb", "figures"):
        (folder / name).mkdir()
        (folder / name / "note.txt").write_text("mine")
    (folder / "report.html").write_text("of the old run")
    assert finished.train("--restart") == outcome(tiny_run.folder) | {"mine/note.txt": b"mine"}


def test_inference_only_without_a_finished_run_is_reported(begin):
    run = begin()
    for _ in range(2):
        with pytest.raises(PerPEFTError, match="without --inference_only"):
            run.train("--inference_only")
        run_interrupted(run.arguments, "group_users")  # stage 1 is done, but there are no groups yet


def test_missing_clip_weights_say_what_to_do(tiny_dataset, tmp_path):
    arguments = ["--dataset", "tiny", "--train_dir", tiny_dataset.train_dir, "--output_dir", tmp_path / "runs", "--device", "cpu"]
    process = start("perpeft_lora_ia3.py", *arguments, HF_HOME=str(tmp_path / "cache"))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2 and "Traceback" not in output, output
    assert re.findall("^error: .*", output, re.M) == [output.splitlines()[-1]]
    message = output.splitlines()[-1]
    assert "openai/clip-vit-base-patch32" in message and "--clip_model" in message and "network" in message


def test_folder_whose_weights_lack_a_part_is_refused(tmp_path, tiny_clip):
    """transformers would only warn, and draw the missing part at random."""
    shutil.copytree(tiny_clip, tmp_path / "clip")
    path = tmp_path / "clip" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != "visual_projection.weight"}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PerPEFTError, match="clip"):
        load_foundation(str(tmp_path / "clip"))


def test_bar_of_an_epoch_shows_loss_items_a_second_and_time_left_and_is_quiet_without_a_terminal(begin, monkeypatch, capsys):
    shown, run = io.StringIO(), begin(batch_size=1, global_epochs=1, num_epochs=1, method="none")
    run.train()
    assert "items/s" not in "".join(capsys.readouterr())
    on_a_terminal = {"disable": False, "file": shown, "mininterval": 0}
    monkeypatch.setattr(progress, "tqdm", lambda **options: tqdm(**options | on_a_terminal))
    run.train("--restart")
    # as in "global 1/2: 54%|#####4    | 20/37 [00:00<00:00, 150.2step/s, loss 2.7726, 1520 items/s]"
    assert re.search(r"global 1/2: .*\[\d\d:\d\d<\d\d:\d\d.*loss \d\.\d{4}, [1-9]\d* items/s\]", shown.getvalue())
