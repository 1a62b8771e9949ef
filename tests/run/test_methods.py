"""The methods and ablations of the paper's Tables 2 and 3: every flag does what it says, and nothing that it does not say."""
import functools
import shutil

import numpy as np
import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import CLIPModel

import perpeft_iisan
from tests.conftest import NUM_ITEMS, RUN, run_interrupted, run_script, tiny_options, trained
from tests.plain import clip_features, clip_inputs, plain_ranks, with_vectors
from tests.run_files import groups_of, rows_of, summary_of, tree, without_seconds
from utils.common.errors import PerPEFTError
from utils.run.opening import open_run


@pytest.fixture(scope="module")
def run_method(tiny_dataset, tiny_clip, tmp_path_factory):
    """Run with some flags changed, once for each set of flags; returns the only run folder."""
    return functools.cache(lambda **changes: trained(tiny_dataset, tiny_clip, tmp_path_factory.mktemp("runs"), **changes))


def test_global_goes_on_where_perpefts_first_stage_ends(run_method, tiny_run):
    folder = run_method(method="global")
    assert folder.name == RUN.format("lora_global")
    rows = without_seconds(folder)
    assert [row["stage"] + row["epoch"] for row in rows] == ["global1", "global2", "global3", "global4"]
    assert rows[:2] == without_seconds(tiny_run.folder)[:2]  # the same training, then as many epochs as stage 3 has
    assert not (folder / "personalized").exists() and not (folder / "groups.csv").exists()
    assert not {"personalized", "group_sizes"} & set(summary_of(folder))


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
        drawn = {name: tensor.clone() for name, tensor in run.model.projectors[0].state_dict().items()}
        found = run.evaluate_saved()
        features = run.source.fetch(np.array([3, 5, 6]), torch.device("cpu"))[0]
    assert found["global"]["test"] == pytest.approx(summary_of(folder)["global"]["test"], abs=1e-12)
    expected = clip_features(CLIPModel.from_pretrained(tiny_clip), clip_inputs(tiny_dataset, tiny_clip, (3, 5, 6)))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    trained_weights = run.model.projectors[0].state_dict()
    assert not any(torch.equal(tensor, trained_weights[name]) for name, tensor in drawn.items())


def test_none_knows_items_by_their_embeddings_alone(run_method, tiny_dataset, tiny_clip):
    folder = run_method(method="none")
    assert folder.name == RUN.format("none")
    counts = summary_of(folder)["trainable_parameters"]
    assert counts["adapters"] == counts["projectors"] == 0 and counts["foundation_model"] is None
    # the figures again, user by user, with the saved recommender and item vectors of zero
    with open_run(tiny_options(tiny_dataset, tiny_clip, folder.parent, method="none", inference_only=True)) as run:
        sasrec = run.model.sasrec.eval()
    sasrec.load_state_dict(torch.load(folder / "global" / "sasrec.pth", weights_only=True))
    model = with_vectors(sasrec, torch.zeros(NUM_ITEMS + 1, 32))
    ranks = [test for _, test in plain_ranks(lambda _: model, tiny_dataset.histories).values()]
    assert summary_of(folder)["global"]["test"]["HR@10"] == pytest.approx(np.mean([rank < 10 for rank in ranks]), abs=1e-9)


def test_none_needs_no_images_weights_or_users_in_every_group_and_is_the_same_run_in_both_scripts(run_method, begin, capsys):
    run = begin(method="none", clip_model="/nowhere", C=41)  # of 40 users
    shutil.rmtree(run.train_dir / "tiny_images")
    assert run.train()["metrics.csv"] == without_seconds(run_method(method="none"))
    run_script([part for part in run.arguments if part not in ("--peft_type", "lora")], perpeft_iisan.main)
    assert "is finished" in capsys.readouterr().out


def test_modality_is_a_run_of_its_own_and_its_adapters_are_of_one_tower(run_method):
    folder = run_method(modality="text", global_epochs=1, num_epochs=1)
    assert folder.name == RUN.format("lora_text")
    for place in ("global", "personalized/group_0", "personalized/group_2"):
        saved = load_file(folder / place / "adapter" / "adapter_model.safetensors")
        assert saved and all("text_model" in name for name in saved)


def test_random_grouping_is_even_seeded_and_ignores_taste(run_method, tiny_run):
    folder = run_method(grouping="random", global_epochs=1, num_epochs=1)
    assert folder.name == RUN.format("lora_grouping_random")
    groups = list(groups_of(folder).values())
    assert sorted(map(groups.count, range(3))) == [13, 13, 14]
    other = run_method(grouping="random", global_epochs=1, num_epochs=1, trial=1)
    assert groups != list(groups_of(other).values())
    clusters = list(groups_of(tiny_run.folder).values())
    largest = max(clusters, key=clusters.count)  # of at least 14 users, spread over all random groups
    assert {group for cluster, group in zip(clusters, groups) if cluster == largest} == {0, 1, 2}


def authors_files(run_folder, folder, ending="lora_tiny_10_0.001_0.0001"):
    """A run's global model under the names that the authors' code uses."""
    folder.mkdir(exist_ok=True)
    for ours, theirs in (("sasrec.pth", "sasrec"), ("projector.pth", "projector"), ("iisan.pth", "encoder")):
        if (run_folder / "global" / ours).exists():
            shutil.copy(run_folder / "global" / ours, folder / f"{theirs}_{ending}.pth")
    if (run_folder / "global" / "adapter").exists():
        shutil.copytree(run_folder / "global" / "adapter", folder / f"clip_encoder_{ending}")
    return folder


@pytest.mark.parametrize("source", ["run", "global", "authors", "file"])
def test_stage_3_from_a_saved_global_model_is_the_same(tiny_run, begin, tmp_path, source):
    theirs = authors_files(tiny_run.folder, tmp_path / "pretrained_models")
    where = {
        "run": tiny_run.folder, "global": tiny_run.folder / "global", "authors": theirs,
        "file": theirs / "sasrec_lora_tiny_10_0.001_0.0001.pth",
    }[source]  # fmt: skip
    run = begin(init_from=where)
    if source == "run":  # it goes on after an interruption
        run_interrupted(run.arguments, "evaluate", 3)
    assert run.train()["metrics.csv"][1:] == without_seconds(tiny_run.folder)[2:]
    (row,) = rows_of(run.folder, "global")
    assert row["epoch"] == "0" and row["train_loss"] == "nan"
    ours, original = summary_of(run.folder), summary_of(tiny_run.folder)
    assert ours["global"]["test"] == original["global"]["test"] and ours["global"]["best_epoch"] == 0
    assert ours["personalized"] == original["personalized"]


def test_iisan_starts_from_the_authors_encoder_file(begin, tmp_path):
    first = begin("first", "iisan", global_epochs=1, num_epochs=1)
    first.train()
    theirs = authors_files(first.folder, tmp_path / "pretrained_models", "iisan_tiny_1_0.001_0.0001")
    second = begin("second", "iisan", global_epochs=1, num_epochs=1, init_from=theirs)
    second.train()
    assert summary_of(second.folder)["personalized"] == summary_of(first.folder)["personalized"]


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("absent", "", "neither a run folder .* a folder with sasrec_lora_tiny_"),
        ("started", "", "has not ended"),
        ("started/global", "", "has not ended"),
        (f"runs/{RUN.format('lora')}", "", "this run's own folder"),
        (f"runs/{RUN.format('lora')}/global", "", "this run's own folder"),
        ("several", "", "choose one of them: .*sasrec_lora_tiny_20_0.001_0.0001.pth"),
        ("incomplete/sasrec_lora_tiny_10_0.001_0.0001.pth", "", "incomplete.*do not fit"),
        ("another/global", "--rank 2", "do not fit"),
        ("another/global", "--hidden_units 16", "do not fit"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_clear_error_and_costs_nothing_that_is_there(
    finished, tiny_run, tmp_path, source, more, message
):
    before = tree(finished.folder)
    for name in ("another", "started/resume"):
        shutil.copytree(tiny_run.folder, tmp_path / name)
    for name, ending in (("several", 10), ("several", 20), ("incomplete", 10)):
        authors_files(tiny_run.folder, tmp_path / name, f"lora_tiny_{ending}_0.001_0.0001")
    shutil.rmtree(tmp_path / "incomplete" / "clip_encoder_lora_tiny_10_0.001_0.0001")
    with pytest.raises(PerPEFTError, match=message):
        finished.train("--init_from", str(tmp_path / source), "--restart", *more.split())
    assert tree(finished.folder) == before
