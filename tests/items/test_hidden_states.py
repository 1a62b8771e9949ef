"""IISAN's cached hidden states: what is computed, what files are read, what is refused, and a run on them alone."""
import errno
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import perpeft_iisan
from models.towers import evenly_spaced
from scripts import extract_hidden_states
from tests.conftest import NUM_ITEMS, RUN, fresh_data, iisan_arguments, run_script
from tests.run_files import change_json, summary_of
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.items.foundation import ensure_hidden_states, load_foundation
from utils.items.hidden_states import HiddenStateStore, has_states, save_hidden_states, states_path
from utils.items.model_files import DEFAULT_CLIP, PairName

CPU = torch.device("cpu")


@pytest.fixture
def copied(tiny_dataset, tiny_clip, tmp_path):
    """A copy of the tiny data set with its hidden states computed beside it, and what their file holds."""
    folder = fresh_data(tiny_dataset, tmp_path / "dataset").train_dir
    path, dataset = states_path(folder, "tiny"), read_dataset(folder, "tiny")
    ensure_hidden_states(dataset, str(tiny_clip), CPU)
    content = torch.load(path, weights_only=True)
    return SimpleNamespace(folder=folder, path=path, note=path.with_suffix(".json"), dataset=dataset, content=content)


def test_states_are_evenly_spaced_from_the_embedding_output_to_the_last_layer():
    even = [0, 2, 4, 6, 8, 10, 12]
    assert evenly_spaced([12, 12]) == [even, even]  # ViT-B/32, as in the paper
    assert evenly_spaced([24, 12]) == [[0, 4, 8, 12, 16, 20, 24], even]  # ViT-L/14
    assert evenly_spaced([6, 12]) == [[0, 1, 2, 3, 4, 5, 6], even]
    assert evenly_spaced([27, 3]) == [[0, 9, 18, 27], [0, 1, 2, 3]]


@pytest.mark.parametrize(("others", "dtype"), [([], torch.float32), ([0, 0, "other"], torch.float16), (["0"], torch.float32)])
def test_published_files_are_read_in_any_order_whatever_rows_of_padding_or_other_items_hold(copied, others, dtype):
    order = torch.randperm(NUM_ITEMS, generator=torch.Generator().manual_seed(3))
    states = [tensor.to(dtype) for tensor in copied.content[:2]]
    nothing = torch.full((len(others), 3, 32), float("nan"), dtype=dtype)
    ids = [*others, *(copied.content[2][row] for row in order)]
    torch.save((*(torch.cat([nothing, tensor[order]]) for tensor in states), ids), copied.path)
    store = HiddenStateStore.open(copied.dataset)
    with mock.patch("utils.items.source.fits_on", lambda device, *arrays: dtype == torch.float16):
        store.place_on(CPU)  # as on a GPU
    items = np.array([3, 30, 1])
    for found, tensor in zip(store.fetch(items, CPU), states, strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, tensor[items - 1].float())
    assert sorted(store.reading_order()) == list(range(1, NUM_ITEMS + 1))


def test_missing_ids_and_rows_with_nan_are_named_together_with_what_to_do(copied):
    image_states, text_states, ids = copied.content
    torch.save((image_states[:-2], text_states[:-2], ids[:-2]), copied.path)
    with pytest.raises(PerPEFTError, match=rf"(?s)to compute it.*without states \(2\): {ids[-2]}, {ids[-1]}"):
        HiddenStateStore.open(copied.dataset)
    image_states[4, 1, 3], text_states[7, 0, 0] = float("nan"), float("inf")
    torch.save((image_states, text_states, ids), copied.path)
    with pytest.raises(PerPEFTError, match=rf"NaN or infinity \(2\): {ids[4]}, {ids[7]}"):
        HiddenStateStore.open(copied.dataset)


def test_iisan_trains_all_stages_from_the_states_alone_without_images_titles_or_weights(copied, tiny_clip, tmp_path):
    shutil.rmtree(copied.folder / "tiny_images")
    (copied.folder / "tiny_texts_final.pickle").unlink()
    copied.note.unlink()  # a published file has none
    dataset = SimpleNamespace(name="tiny", train_dir=copied.folder)
    perpeft_iisan.main(iisan_arguments(dataset, tmp_path / "no_such_clip", tmp_path / "runs"))
    folder = tmp_path / "runs" / RUN.format("iisan")
    groups = [torch.load(folder / "personalized" / f"group_{group}" / "iisan.pth", weights_only=True) for group in range(3)]
    assert any(not torch.equal(groups[0][name], groups[1][name]) for name in groups[0])  # groups train apart
    # 3 states x (2 blocks of 32-32-32 for text and image, one joint block, one projection), and the gates
    parameters = 3 * (3 * 2 * (32 * 32 + 32) + 32 * 32 + 32) + 9
    assert [sum(tensor.numel() for tensor in weights.values()) for weights in groups] == [parameters] * 3
    assert summary_of(folder)["trainable_parameters"]["adapter_of_one_group"] == parameters


def test_extract_hidden_states_on_its_own_writes_the_same_file(tiny_dataset, tiny_clip, copied, tmp_path, capsys):
    folder = fresh_data(tiny_dataset, tmp_path / "another").train_dir
    arguments = ("--dataset", "tiny", "--train_dir", folder, "--clip_model", tiny_clip, "--device", "cpu")
    for expected in ("is written", "was there already"):
        run_script(arguments, extract_hidden_states.main)
        assert expected in capsys.readouterr().out
    *states, ids = torch.load(states_path(folder, "tiny"), weights_only=True)
    assert ids == copied.content[2] == copied.dataset.raw_ids
    assert all(torch.equal(found, expected) for found, expected in zip(states, copied.content))


def test_states_of_another_model_are_refused_by_its_name_or_their_shapes_and_name_the_options_that_read_them(copied):
    def refused(expected, model):
        with pytest.raises(PerPEFTError, match=expected):
            HiddenStateStore.open(copied.dataset, model)

    refused("was computed by .*tiny_clip.*not 'elsewhere'; pass --clip_model /.*tiny_clip, or delete it", "elsewhere")
    save_hidden_states(copied.path, *copied.content, PairName("dino", "e5", "cls"))
    refused("pass --image_model dino --text_model e5 --text_pooling cls, or delete it", "some_clip")
    copied.note.unlink()
    refused(r"another CLIP.*\(3, 32\), where openai.* has \(7, 768\); pass the right --clip_model", DEFAULT_CLIP)
    copied.note.write_text(json.dumps({"clip_model": DEFAULT_CLIP, "clip_files": None}))  # as the first versions wrote it
    assert HiddenStateStore.open(copied.dataset, DEFAULT_CLIP).num_items == NUM_ITEMS
    refused(f"not 'openai/clip-vit-large-patch14'; pass --clip_model {DEFAULT_CLIP}, or", "openai/clip-vit-large-patch14")


def test_a_clip_is_known_again_by_its_files_wherever_they_lie(copied, tiny_clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_clip.parent)
    moved = shutil.copytree(tiny_clip, tmp_path / "moved")
    for name in (tiny_clip.name, str(moved)):
        assert HiddenStateStore.open(copied.dataset, name).num_items == NUM_ITEMS
    (moved / "config.json").write_text("{}")  # another one now
    with pytest.raises(PerPEFTError, match="was computed by"):
        HiddenStateStore.open(copied.dataset, str(moved))


def test_states_that_cannot_be_written_leave_none_of_another_model(copied, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("utils.items.hidden_states.save_tensors", mock.Mock(side_effect=full))
    with pytest.raises(PerPEFTError, match="make room or allow writing there"):
        save_hidden_states(copied.path, torch.ones(2, 3, 4), torch.ones(2, 3, 4), ["a", "b"], "another")
    assert not has_states(copied.folder, "tiny")


def test_several_processes_compute_states_once_where_those_of_another_modality_are_there(copied, tiny_clip, monkeypatch):
    change_json(copied.note, lambda note: note.update(modality="text"))
    loaded = []
    monkeypatch.setattr("utils.items.foundation.load_foundation", lambda name: loaded.append(name) or load_foundation(name))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: ensure_hidden_states(copied.dataset, str(tiny_clip), CPU, modality="image"), range(2)))
    assert len(loaded) == 1 and has_states(copied.folder, "tiny", "image")
