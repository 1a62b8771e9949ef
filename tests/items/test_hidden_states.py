"""IISAN's cached hidden states: what is computed, what files are read, what is refused, and a run on them alone."""
import errno
import json
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import perpeft_iisan
from models.towers import evenly_spaced
from tests.conftest import NUM_ITEMS, iisan_arguments
from tests.run_files import summary_of
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.items.foundation import DEFAULT_CLIP, ensure_hidden_states, known_model, load_foundation
from utils.items.hidden_states import HiddenStateStore, has_states, save_hidden_states, states_path
from utils.items.model_files import PairName

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def computed(tiny_dataset, tiny_clip, tmp_path_factory):
    """The tiny data set copied, with its hidden states computed beside it."""
    folder = tmp_path_factory.mktemp("states") / "dataset"
    shutil.copytree(tiny_dataset.train_dir, folder)
    dataset = read_dataset(folder, tiny_dataset.name)
    path = ensure_hidden_states(dataset, str(tiny_clip), CPU)
    return SimpleNamespace(folder=folder, dataset=dataset, path=path, content=torch.load(path, weights_only=True))


@pytest.fixture
def copied(computed, tmp_path):
    """The same in a folder of the test's own, with a function that rewrites the file."""
    folder = tmp_path / "dataset"
    shutil.copytree(computed.folder, folder)
    path = folder / computed.path.name
    return SimpleNamespace(
        folder=folder, path=path, dataset=read_dataset(folder, "tiny"), rewrite=lambda *content: torch.save(content, path)
    )


@pytest.mark.parametrize(
    ("image_depth", "text_depth", "image_layers", "text_layers"),
    [
        (12, 12, [0, 2, 4, 6, 8, 10, 12], [0, 2, 4, 6, 8, 10, 12]),  # ViT-B/32, as in the paper
        (24, 12, [0, 4, 8, 12, 16, 20, 24], [0, 2, 4, 6, 8, 10, 12]),  # ViT-L/14
        (6, 12, [0, 1, 2, 3, 4, 5, 6], [0, 2, 4, 6, 8, 10, 12]),
        (27, 3, [0, 9, 18, 27], [0, 1, 2, 3]),
    ],
)
def test_states_are_evenly_spaced_from_the_embedding_output_to_the_last_layer(image_depth, text_depth, image_layers, text_layers):
    assert evenly_spaced([image_depth, text_depth]) == [image_layers, text_layers]


@pytest.mark.parametrize("padding", [None, 0, "0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_published_files_are_read_in_any_order_with_or_without_a_padding_row(copied, computed, padding, dtype):
    image_states, text_states, ids = computed.content
    order = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(3))
    shuffled = [image_states[order].to(dtype), text_states[order].to(dtype), [ids[row] for row in order]]
    if padding is not None:
        shuffled = [torch.cat([torch.zeros_like(states[:1]), states]) for states in shuffled[:2]] + [[padding, *shuffled[2]]]
    copied.rewrite(*shuffled)
    store = HiddenStateStore.open(copied.dataset)
    items = np.array([3, 30, 1])
    found_image, found_text = store.fetch(items, CPU)
    assert found_image.dtype == found_text.dtype == torch.float32
    assert torch.equal(found_image, image_states[items - 1].to(dtype).float())
    assert torch.equal(found_text, text_states[items - 1].to(dtype).float())
    assert sorted(store.reading_order()) == list(range(1, NUM_ITEMS + 1))


def test_missing_ids_and_rows_with_nan_are_named_together_with_what_to_do(copied, computed):
    image_states, text_states, ids = (computed.content[0].clone(), computed.content[1].clone(), list(computed.content[2]))
    copied.rewrite(image_states[:-2], text_states[:-2], ids[:-2])
    with pytest.raises(PerPEFTError, match=rf"(?s)to compute it.*without states \(2\): {ids[-2]}, {ids[-1]}"):
        HiddenStateStore.open(copied.dataset)
    image_states[4, 1, 3], text_states[7, 0, 0] = float("nan"), float("inf")
    copied.rewrite(image_states, text_states, ids)
    with pytest.raises(PerPEFTError, match=rf"NaN or infinity \(2\): {ids[4]}, {ids[7]}"):
        HiddenStateStore.open(copied.dataset)


def test_nan_in_the_padding_row_or_of_items_not_in_the_data_set_is_no_matter(copied, computed):
    image_states, text_states, ids = computed.content
    nothing = torch.full_like(image_states[:1], float("nan"))
    copied.rewrite(torch.cat([nothing, image_states, nothing]), torch.cat([nothing, text_states, nothing]), [0, *ids, "other"])
    assert torch.equal(HiddenStateStore.open(copied.dataset).fetch(np.array([1]), CPU)[0], image_states[:1])


def test_states_of_another_clip_are_refused_by_shape_and_by_name(copied, computed, tiny_clip):
    with pytest.raises(PerPEFTError, match=r"another CLIP.*\(3, 32\).*\(7, 768\).*--clip_model"):
        HiddenStateStore.open(copied.dataset, skeleton=known_model(DEFAULT_CLIP))
    with pytest.raises(PerPEFTError, match="was computed by .*tiny_clip.*not 'elsewhere'"):
        HiddenStateStore.open(copied.dataset, "elsewhere")
    assert json.loads(copied.path.with_suffix(".json").read_text())["clip_model"] == str(tiny_clip)


def test_iisan_trains_all_stages_from_the_states_alone_without_images_titles_or_weights(copied, tiny_clip, tmp_path):
    shutil.rmtree(copied.folder / "tiny_images")
    (copied.folder / "tiny_texts_final.pickle").unlink()
    copied.path.with_suffix(".json").unlink()  # a published file has none
    dataset = SimpleNamespace(name="tiny", train_dir=copied.folder)
    perpeft_iisan.main(iisan_arguments(dataset, tmp_path / "no_such_clip", tmp_path / "runs"))
    folder = tmp_path / "runs" / "tiny_iisan_lr0.001_wd0.0001_seed0"
    summary = summary_of(folder)
    assert summary["config"]["peft_type"] == "iisan" and set(summary["personalized"]) == {"best_epoch", "valid", "test"}
    first, second, third = (
        torch.load(folder / "personalized" / f"group_{group}" / "iisan.pth", weights_only=True) for group in range(3)
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)  # groups train apart
    for weights in (first, second, third):
        assert weights["CombProj.1.0.weight"].shape == (32, 32) and weights["weight_scalar"].shape == (3, 3)
        # 3 states x (2 blocks of 32-32-32 for text and image, one joint block, one projection), and the gates
        assert sum(tensor.numel() for tensor in weights.values()) == 3 * (3 * 2 * (32 * 32 + 32) + 32 * 32 + 32) + 9
        assert summary["trainable_parameters"]["adapter_of_one_group"] == sum(tensor.numel() for tensor in weights.values())


def test_extract_hidden_states_on_its_own_writes_the_same_file(tiny_dataset, tiny_clip, computed, tmp_path):
    folder = tmp_path / "dataset"
    shutil.copytree(tiny_dataset.train_dir, folder)
    command = [sys.executable, "-m", "scripts.extract_hidden_states", "--dataset", "tiny", "--train_dir", str(folder)]
    done = subprocess.run([*command, "--clip_model", str(tiny_clip), "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    image_states, text_states, ids = torch.load(str(states_path(folder, "tiny")), weights_only=True, mmap=True)
    assert ids == computed.content[2] == computed.dataset.raw_ids
    foundation = load_foundation(str(tiny_clip))
    for states in ((image_states, text_states), foundation.hidden_states(foundation.store(computed.dataset), CPU)):
        assert torch.equal(states[0], computed.content[0]) and torch.equal(states[1], computed.content[1])


def test_a_clip_is_known_again_by_its_files_wherever_they_lie(copied, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_clip.parent)
    assert HiddenStateStore.open(copied.dataset, tiny_clip.name).num_items == NUM_ITEMS
    moved = shutil.copytree(tiny_clip, tmp_path / "moved")
    assert HiddenStateStore.open(copied.dataset, str(moved)).num_items == NUM_ITEMS
    (moved / "config.json").write_text("{}")  # another one now
    with pytest.raises(PerPEFTError, match="was computed by"):
        HiddenStateStore.open(copied.dataset, str(moved))


def test_states_that_cannot_be_written_leave_none_of_another_model(copied, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("utils.items.hidden_states.save_tensors", full)
    with pytest.raises(PerPEFTError, match="make room or allow writing there"):
        save_hidden_states(copied.path, torch.ones(2, 3, 4), torch.ones(2, 3, 4), ["a", "b"], "another")
    assert not has_states(copied.folder, "tiny")


def test_states_of_a_pair_name_the_options_that_read_them(copied):
    pair = PairName("dino", "e5", "cls")
    save_hidden_states(copied.path, torch.ones(30, 3, 4), torch.ones(30, 3, 4), copied.dataset.raw_ids, pair)
    with pytest.raises(PerPEFTError, match="pass --image_model dino --text_model e5 --text_pooling cls, or delete it"):
        HiddenStateStore.open(copied.dataset, "some_clip")


def test_several_processes_compute_states_once_where_those_of_another_modality_are_there(copied, tiny_clip, monkeypatch):
    note = copied.path.with_suffix(".json")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"modality": "text"}))
    loaded = []
    monkeypatch.setattr("utils.items.foundation.load_foundation", lambda name: loaded.append(name) or load_foundation(name))
    threads = [
        threading.Thread(target=ensure_hidden_states, args=(copied.dataset, str(tiny_clip), CPU), kwargs={"modality": "image"})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 1 and has_states(copied.folder, "tiny", "image")


def test_a_note_of_a_clip_from_the_hub_goes_by_its_name(copied):
    copied.path.with_suffix(".json").write_text(json.dumps({"clip_model": "openai/clip-vit-base-patch32", "clip_files": None}))
    assert HiddenStateStore.open(copied.dataset, "openai/clip-vit-base-patch32").num_items == NUM_ITEMS
    with pytest.raises(PerPEFTError, match="not 'openai/clip-vit-large-patch14'"):
        HiddenStateStore.open(copied.dataset, "openai/clip-vit-large-patch14")
