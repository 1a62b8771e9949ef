"""The methods and ablations of the paper's Tables 2 and 3: every flag does what it says, and nothing that it does not say."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftConfig
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

import perpeft_iisan
from models import IISAN, ClipPeftEncoder
from models.peft_configs import ia3_config, lora_config
from tests.conftest import NUM_ITEMS, RUN, iisan_arguments, run_script, tiny_arguments, tiny_options, write_dataset
from tests.run.test_pipeline import read_csv, rows_of, without_seconds
from utils.common.errors import PerPEFTError
from utils.run.opening import open_run
from utils.run.run import Run
from utils.training.sampling import Sampler


@pytest.fixture(scope="module")
def run_method(tiny_dataset, tiny_clip, tmp_path_factory):
    """Run with some flags changed, once for each set of flags; returns the only run folder."""
    done = {}

    def run(**changes):
        key = str(sorted(changes.items()))
        if key not in done:
            output_dir = tmp_path_factory.mktemp("runs")
            run_script(tiny_arguments(tiny_dataset, tiny_clip, output_dir, **changes))
            (done[key],) = output_dir.iterdir()
        return done[key]

    return run


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


# ---------------------------------------------------------------- methods that end with stage 1


def test_global_goes_on_where_perpefts_first_stage_ends(run_method, tiny_run):
    folder = run_method(method="global")
    assert folder.name == RUN.format("lora_global")
    rows = without_seconds(folder)
    assert [(row["stage"], row["epoch"]) for row in rows] == [("global", str(epoch)) for epoch in (1, 2, 3, 4)]
    assert rows[:2] == without_seconds(tiny_run.folder)[:2]  # the same training, then as many epochs as stage 3 has
    assert not (folder / "personalized").exists() and not (folder / "groups.csv").exists()
    summary = summary_of(folder)
    assert "personalized" not in summary and "group_sizes" not in summary
    best = max(rows, key=lambda row: float(row["valid_NDCG@20"]))
    assert summary["global"]["test"]["HR@20"] == float(best["test_HR@20"])


def test_large_global_has_as_many_parameters_as_all_groups_together(run_method, tiny_run):
    folder = run_method(method="large_global", global_epochs=1, num_epochs=1)
    assert folder.name == RUN.format("lora_large_global")
    large = summary_of(folder)["trainable_parameters"]
    small = summary_of(tiny_run.folder)["trainable_parameters"]
    assert large["adapters"] == large["adapter_of_one_group"] == small["adapters"] == 3 * small["adapter_of_one_group"]
    saved = load_file(folder / "global" / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == small["adapters"]
    config = PeftConfig.from_pretrained(folder / "global" / "adapter")
    assert (config.r, config.lora_alpha) == (12, 24)


def test_frozen_trains_the_projector_on_clips_own_features(run_method, tiny_dataset, tiny_clip):
    folder = run_method(method="frozen")
    assert folder.name == RUN.format("frozen")
    assert sorted(path.name for path in (folder / "global").iterdir()) == ["projector.pth", "sasrec.pth"]
    counts = summary_of(folder)["trainable_parameters"]
    assert counts["adapters"] == 0 and counts["projectors"] == 32 * 64 + 64 + 2 * 64 + 64 * 32 + 32 + 2 * 32
    with open_run(tiny_options(tiny_dataset, tiny_clip, folder.parent, method="frozen", inference_only=True)) as run:
        found = run.evaluate_saved()
        start = torch.load(folder / "global" / "projector.pth", weights_only=True)
        features = run.source.fetch(np.array([3, 5, 6]), torch.device("cpu"))[0]
    assert found["global"]["test"] == pytest.approx(summary_of(folder)["global"]["test"], abs=1e-12)
    clip = CLIPModel.from_pretrained(tiny_clip).eval()
    processor, tokenizer = AutoImageProcessor.from_pretrained(tiny_clip, use_fast=False), AutoTokenizer.from_pretrained(tiny_clip)
    for row, item in enumerate((3, 5, 6)):
        image = Image.open(tiny_dataset.train_dir / "tiny_images" / f"B{item:03d}.jpg")
        title = tiny_dataset.titles[item - 1] or "No description available."
        inputs = processor(image, return_tensors="pt") | tokenizer(title, truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            output = clip(**inputs)
        expected = torch.cat([output.image_embeds[0], output.text_embeds[0]])
        torch.testing.assert_close(features[row], expected, rtol=1e-4, atol=1e-5)
    # the projector has trained: it is not what it was drawn as
    with open_run(tiny_options(tiny_dataset, tiny_clip, folder.parent / "fresh", method="frozen")) as run:
        fresh = run.model.projectors[0].state_dict()
    assert all(not torch.equal(fresh[name], start[name]) for name in fresh)


def test_none_knows_items_by_their_embeddings_alone(run_method, tiny_dataset, tiny_clip):
    folder = run_method(method="none")
    assert folder.name == RUN.format("none")
    counts = summary_of(folder)["trainable_parameters"]
    assert counts["adapters"] == counts["projectors"] == 0 and counts["foundation_model"] is None
    # the figures again, user by user, with the saved recommender and item vectors of zero
    with open_run(tiny_options(tiny_dataset, tiny_clip, folder.parent, method="none", inference_only=True)) as run:
        sasrec = run.model.sasrec.eval()
    sasrec.load_state_dict(torch.load(folder / "global" / "sasrec.pth", weights_only=True))
    zeros, hits = torch.zeros(NUM_ITEMS + 1, 32), []
    for items in tiny_dataset.histories.values():
        if len(items) < 3:
            continue
        history, target = items[:-1], items[-1]
        seq = torch.tensor([([0] * 10 + history)[-10:]])
        with torch.no_grad():
            scores = sasrec.item_emb.weight @ sasrec.states(seq, zeros)[0, -1]
        others = [item for item in range(1, NUM_ITEMS + 1) if item not in history and item != target]
        hits.append(sum(bool(scores[item] >= scores[target]) for item in others) < 10)
    assert summary_of(folder)["global"]["test"]["HR@10"] == pytest.approx(np.mean(hits), abs=1e-9)


def test_none_needs_neither_images_nor_weights(tiny_dataset, run_method, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(tiny_dataset.train_dir, folder, ignore=shutil.ignore_patterns("*_images", "*_store"))
    options = {"train_dir": folder, "method": "none"}
    run_script(tiny_arguments(tiny_dataset, tmp_path / "no_such_clip", tmp_path / "runs", **options))
    assert without_seconds(tmp_path / "runs" / RUN.format("none")) == without_seconds(run_method(method="none"))


def test_methods_without_an_adapter_are_the_same_run_in_both_scripts(run_method, tiny_dataset, tiny_clip, capsys):
    folder = run_method(method="none")
    perpeft_iisan.main(iisan_arguments(tiny_dataset, tiny_clip, folder.parent, method="none"))
    assert "is finished" in capsys.readouterr().out


# ---------------------------------------------------------------- one modality


@pytest.mark.parametrize("config", [lora_config, ia3_config])
@pytest.mark.parametrize(
    "modality, used, unused", [("text", "text_model", "vision_model"), ("image", "vision_model", "text_model")]
)
def test_one_modality_leaves_no_gradient_in_the_other_tower(tiny_clip, config, modality, used, unused):
    processor = AutoImageProcessor.from_pretrained(tiny_clip, use_fast=False)
    clip = CLIPModel.from_pretrained(tiny_clip)
    encoder = ClipPeftEncoder(clip, config(), processor, modality=modality)
    both = ClipPeftEncoder(CLIPModel.from_pretrained(tiny_clip), config(), processor)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.tensor([[0, 7, 8, 2], [0, 9, 2, 2], [0, 5, 6, 2]])
    encoder.eval()
    features = encoder(pixels, tokens)
    half = slice(0, 16) if modality == "image" else slice(16, 32)
    assert features.shape[1] == encoder.feature_dim == 16
    torch.testing.assert_close(features, both.eval()(pixels, tokens)[:, half])  # fresh adapters change nothing
    other = encoder(torch.zeros_like(pixels), tokens) if modality == "text" else encoder(pixels, tokens.flip(0))
    assert torch.equal(features, other)
    features.square().mul(torch.arange(16)).sum().backward()
    assert all(parameter.grad is None for name, parameter in encoder.named_parameters() if unused in name)
    names = set(encoder.group_parameters(0))
    assert names == {name for name in both.group_parameters(0) if used in name}
    assert all(parameter.grad is not None for parameter in encoder.group_parameters(0).values())


@pytest.mark.parametrize("modality", ["image", "text"])
def test_iisan_of_one_modality_is_that_stream_of_the_whole(modality):
    torch.manual_seed(0)
    whole, one = IISAN(6, 5, 3, 2), IISAN(6, 5, 3, 2, modality=modality)
    prefixes = ("weight_scalar", {"image": "ImgBlocks", "text": "TextBlocks"}[modality])
    weights = {name: torch.randn_like(value) for name, value in whole.state_dict().items()}
    whole.load_state_dict(weights)
    one.load_state_dict({name: value for name, value in weights.items() if name.startswith(prefixes)})  # strictly
    image_states, text_states = torch.randn(4, 3, 6), torch.randn(4, 3, 5)
    stream = {"text": slice(0, 5), "image": slice(5, 11)}[modality]
    torch.testing.assert_close(one(image_states, text_states), whole(image_states, text_states)[:, stream])
    assert one.out_dim == stream.stop - stream.start


def test_modality_is_a_run_of_its_own_and_its_adapters_are_of_one_tower(run_method):
    folder = run_method(modality="text", global_epochs=1, num_epochs=1)
    assert folder.name == RUN.format("lora_text")
    for place in ("global", "personalized/group_0", "personalized/group_2"):
        saved = load_file(folder / place / "adapter" / "adapter_model.safetensors")
        assert saved and all("text_model" in name for name in saved)


# ---------------------------------------------------------------- stage 3's negatives and stage 2's groups


def test_negatives_of_stage_3_can_be_drawn_from_all_items(tiny_dataset, tiny_clip, tmp_path, monkeypatch):
    drawn = {}
    sample = Sampler.batch

    def batch(self, epoch, step):
        found = sample(self, epoch, step)
        if len(self._candidates) == 3:  # stage 3
            drawn.setdefault(found.group, set()).update(found.items[found.negatives[found.negatives > 0]].tolist())
        return found

    monkeypatch.setattr(Sampler, "batch", batch)
    quick = {"global_epochs": 1, "num_epochs": 8, "modality": "text"}
    run_script(tiny_arguments(tiny_dataset, tiny_clip, tmp_path, negatives="all", **quick))
    folder = next(tmp_path.iterdir())
    assert folder.name == RUN.format("lora_text_negatives_all")
    assert drawn and all(items == set(range(1, NUM_ITEMS + 1)) for items in drawn.values())


def test_random_grouping_is_even_seeded_and_ignores_taste(run_method, tiny_run):
    folder = run_method(grouping="random", global_epochs=1, num_epochs=1)
    assert folder.name == RUN.format("lora_grouping_random")
    groups = [row["group"] for row in read_csv(folder / "groups.csv")]
    assert sorted(map(groups.count, "012")) == [13, 13, 14]
    other = run_method(grouping="random", global_epochs=1, num_epochs=1, trial=1)
    assert groups != [row["group"] for row in read_csv(other / "groups.csv")]
    clusters = [row["group"] for row in read_csv(tiny_run.folder / "groups.csv")]
    largest = max(clusters, key=clusters.count)  # of at least 14 users, spread over all random groups
    assert {group for cluster, group in zip(clusters, groups) if cluster == largest} == set("012")


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"method": "global", "negatives": "all"}, "--negatives all has no effect with --method global"),
        ({"method": "frozen", "grouping": "random"}, "--grouping random has no effect with --method frozen"),
        ({"method": "none", "modality": "text"}, "--modality text has no effect with --method none"),
        ({"method": "global", "init_from": "somewhere"}, "--init_from somewhere has no effect with --method global"),
        ({"method": "large_global", "peft_type": "ia3"}, "needs --peft_type lora"),
        ({"method": "best"}, "invalid choice: 'best'"),
    ],
)
def test_flags_without_effect_are_refused(tiny_dataset, tiny_clip, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        run_script(tiny_arguments(tiny_dataset, tiny_clip, tmp_path, **flags))
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- ranks of every user


@pytest.mark.parametrize("stage", ["global", "personalized"])
def test_ranks_agree_with_the_reported_metrics(tiny_run, tiny_dataset, stage):
    rows = read_csv(tiny_run.folder / f"{stage}_ranks.csv")
    evaluated = sorted(user for user, items in tiny_dataset.histories.items() if len(items) >= 3)
    assert [int(row["user"]) for row in rows] == evaluated
    summary = summary_of(tiny_run.folder)[stage]
    for split in ("valid", "test"):
        ranks = [int(row[f"{split}_rank"]) for row in rows]
        assert np.mean([rank < 20 for rank in ranks]) == pytest.approx(summary[split]["HR@20"])
        gains = [1 / np.log2(rank + 2) if rank < 10 else 0 for rank in ranks]
        assert np.mean(gains) == pytest.approx(summary[split]["NDCG@10"])


# ---------------------------------------------------------------- starting from a global model


def authors_files(run_folder, folder, ending="lora_tiny_10_0.001_0.0001"):
    """A run's global model under the names that the authors' code uses."""
    folder.mkdir(exist_ok=True)
    shutil.copy(run_folder / "global" / "sasrec.pth", folder / f"sasrec_{ending}.pth")
    shutil.copy(run_folder / "global" / "projector.pth", folder / f"projector_{ending}.pth")
    shutil.copytree(run_folder / "global" / "adapter", folder / f"clip_encoder_{ending}")
    return folder


@pytest.mark.parametrize("source", ["run", "global", "authors", "file"])
def test_stage_3_from_a_saved_global_model_is_the_same(tiny_run, tiny_dataset, tiny_clip, tmp_path, source):
    theirs = authors_files(tiny_run.folder, tmp_path / "pretrained_models")
    where = {
        "run": tiny_run.folder, "global": tiny_run.folder / "global", "authors": theirs,
        "file": theirs / "sasrec_lora_tiny_10_0.001_0.0001.pth",
    }[source]  # fmt: skip
    run_script(tiny_arguments(tiny_dataset, tiny_clip, tmp_path / "runs", init_from=where))
    folder = tmp_path / "runs" / RUN.format("lora")
    assert [row | {"seconds": 0} for row in rows_of(folder, "personalized")] == [
        row | {"seconds": 0} for row in rows_of(tiny_run.folder, "personalized")
    ]
    (row,) = rows_of(folder, "global")
    assert row["epoch"] == "0" and row["train_loss"] == "nan"
    ours, original = summary_of(folder), summary_of(tiny_run.folder)
    assert ours["global"]["test"] == original["global"]["test"] and ours["global"]["best_epoch"] == 0
    assert ours["personalized"] == original["personalized"]


def test_iisan_starts_from_the_authors_encoder_file(tiny_dataset, tiny_clip, tmp_path):
    def arguments(output_dir, **changes):
        return iisan_arguments(tiny_dataset, tiny_clip, output_dir, global_epochs=1, num_epochs=1, **changes)

    perpeft_iisan.main(arguments(tmp_path / "first"))
    first = tmp_path / "first" / RUN.format("iisan")
    theirs = tmp_path / "pretrained_models"
    theirs.mkdir()
    for ours, name in (("sasrec", "sasrec"), ("projector", "projector"), ("iisan", "encoder")):
        shutil.copy(first / "global" / f"{ours}.pth", theirs / f"{name}_iisan_tiny_1_0.001_0.0001.pth")
    perpeft_iisan.main(arguments(tmp_path / "second", init_from=theirs))
    second = tmp_path / "second" / RUN.format("iisan")
    assert summary_of(second)["personalized"] == summary_of(first)["personalized"]


def test_a_run_from_a_global_model_goes_on_after_an_interruption(tiny_run, tiny_dataset, tiny_clip, tmp_path, monkeypatch):
    arguments = tiny_arguments(tiny_dataset, tiny_clip, tmp_path / "runs", init_from=tiny_run.folder)
    evaluate, calls = Run.evaluate, []

    def evaluate_twice(self):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt(2)
        return evaluate(self)

    monkeypatch.setattr(Run, "evaluate", evaluate_twice)
    with pytest.raises(KeyboardInterrupt):
        run_script(arguments)
    run_script(arguments)
    folder = tmp_path / "runs" / RUN.format("lora")
    assert summary_of(folder)["personalized"] == summary_of(tiny_run.folder)["personalized"]


def test_init_from_nothing_several_or_another_shape_is_one_clear_error(tiny_run, tiny_dataset, tiny_clip, tmp_path):
    def run(output_dir=tmp_path / "runs", **changes):
        with pytest.raises(PerPEFTError) as error:
            run_script(tiny_arguments(tiny_dataset, tiny_clip, output_dir, **changes))
        return str(error.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    assert "neither a run folder" in run(init_from=empty) and "sasrec_lora_tiny_" in run(init_from=empty)
    assert "neither a run folder" in run(init_from=tmp_path / "absent")
    theirs = authors_files(tiny_run.folder, tmp_path / "pretrained_models")
    authors_files(tiny_run.folder, theirs, "lora_tiny_20_0.001_0.0001")
    message = run(init_from=theirs)
    assert "choose one of them" in message and "sasrec_lora_tiny_20_0.001_0.0001.pth" in message
    assert "do not fit" in run(init_from=tiny_run.folder, rank=2, output_dir=tmp_path / "other")
    assert "do not fit" in run(init_from=tiny_run.folder, hidden_units=16, output_dir=tmp_path / "narrow")
    shutil.rmtree(theirs / "clip_encoder_lora_tiny_20_0.001_0.0001")
    message = run(init_from=theirs / "sasrec_lora_tiny_20_0.001_0.0001.pth", output_dir=tmp_path / "incomplete")
    assert "pretrained_models" in message


def test_a_source_that_cannot_be_used_costs_nothing_that_is_there(copied_run, tiny_run, tmp_path):
    before = sorted(path.relative_to(copied_run.folder) for path in copied_run.folder.rglob("*"))
    for source, message in ((tmp_path / "absent", "neither a run folder"), (copied_run.folder, "this run's own folder")):
        with pytest.raises(PerPEFTError, match=message):
            run_script([*copied_run.arguments, "--init_from", str(source), "--restart"])
    with pytest.raises(PerPEFTError, match="this run's own folder"):
        run_script([*copied_run.arguments, "--init_from", str(copied_run.folder / "global"), "--restart"])
    assert sorted(path.relative_to(copied_run.folder) for path in copied_run.folder.rglob("*")) == before
    shutil.copytree(tiny_run.folder, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "resume").mkdir()
    with pytest.raises(PerPEFTError, match="has not ended"):
        run_script([*copied_run.arguments, "--init_from", str(tmp_path / "unfinished"), "--restart"])


def test_only_groups_need_as_many_users_as_groups(tmp_path, tiny_clip):
    histories = {user: [1 + (user + step) % 6 for step in range(5)] for user in range(1, 5)}
    folder = write_dataset(tmp_path / "dataset", "few", histories, [f"lamp {item}" for item in range(1, 7)])
    few = SimpleNamespace(name="few", train_dir=folder)
    run_script(tiny_arguments(few, tiny_clip, tmp_path / "runs", method="none", C=8, global_epochs=1, num_epochs=1))
    with pytest.raises(PerPEFTError, match="8 groups"):
        run_script(tiny_arguments(few, tiny_clip, tmp_path / "runs", C=8))
