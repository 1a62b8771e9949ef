"""Nothing in a data set, a checkpoint or a CLIP folder runs code, makes the project read elsewhere, or reaches the network."""
import contextlib
import copyreg
import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from unittest import mock

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from models import IISAN, IISANEncoder
from scripts import check_data, extract_hidden_states
from tests.conftest import RAW_IDS, run_script, save_tiny_clip, tiny_arguments, tiny_options, tiny_titles
from tests.torch_files import with_pickle
from utils.common.errors import PerPEFTError
from utils.common.pickles import load_pickle
from utils.data.dataset import read_dataset
from utils.data.image_names import image_file_name
from utils.items.foundation import ensure_hidden_states, load_foundation
from utils.items.hidden_states import HiddenStateStore, states_path
from utils.items.preprocessing import read_image
from utils.run.build import build_model
from utils.run.hyperparameters import read_hyperparameters
from utils.training.checkpoints import Checkpoint, load_adapter, load_weights, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
CPU = torch.device("cpu")

RAN = []


class Fillable:
    """Runs code when it is made or when its state is set."""

    def __new__(cls, *words):
        if words:
            RAN.append(words)
        return super().__new__(cls)

    def __setstate__(self, state):
        RAN.append(state)


class Reduced:
    """Pickles as a call."""

    def __reduce__(self):
        return Fillable, ("by REDUCE",)


MODULE = Fillable.__module__.encode()
CODE = 240  # of the extension registry, for private use
PAYLOADS = {
    **{f"a call, protocol {protocol}": pickle.dumps(Reduced(), protocol) for protocol in range(6)},
    "an instance in text": b"(Vby INST\ni" + MODULE + b"\nFillable\n.",
    "an object": b"(c" + MODULE + b"\nFillable\nVby OBJ\no.",
    "a new object": b"\x80\x02c" + MODULE + b"\nFillable\nX\x09\x00\x00\x00by NEWOBJ\x85\x81.",
    "a new object with names": b"\x80\x04c" + MODULE + b"\nFillable\nX\x0c\x00\x00\x00by NEWOBJ_EX\x85}\x92.",
    "a state that is set": b"\x80\x02c" + MODULE + b"\nFillable\n)\x81X\x08\x00\x00\x00by BUILDb.",
    "an extension": b"\x80\x02\x82" + bytes([CODE]) + b"X\x04\x00\x00\x00by 1\x85R.",
    "an extension of two bytes": b"\x80\x02\x83" + bytes([CODE, 0]) + b"X\x04\x00\x00\x00by 2\x85R.",
    "an extension of four bytes": b"\x80\x02\x84" + bytes([CODE, 0, 0, 0]) + b"X\x04\x00\x00\x00by 4\x85R.",
    "within a dict": pickle.dumps({1: "B001", 2: [Reduced()]}),
    "evaluated text": b"cbuiltins\neval\n(V__import__('tests.common.test_security').common.test_security.RAN.append(1)\ntR.",
}


@pytest.fixture(autouse=True)
def nothing_ran():
    """No test of this module lets a payload run, but to show that it would."""
    copyreg.add_extension(__name__, "Fillable", CODE)
    pickle.loads(PAYLOADS["an extension"])  # from now on the registry hands the class out without asking find_class
    RAN.clear()
    yield
    copyreg.remove_extension(__name__, "Fillable", CODE)
    assert RAN == []


@contextlib.contextmanager
def refused(path, content, error=PerPEFTError, match=None):
    """What is read meanwhile must raise, with another content in a file."""
    sound = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(error, match=match):
        yield
    assert RAN == []
    path.write_bytes(sound)


def assert_live(load, content):
    """Without protection a payload would run: otherwise nothing would follow from its not running."""
    with contextlib.suppress(Exception):  # what comes after it may fail
        load(io.BytesIO(content))
    assert RAN
    RAN.clear()


@pytest.mark.parametrize("kind", PAYLOADS)
def test_pickle_with_code_is_refused_by_every_reader_of_pickles(kind, folder, tmp_path):
    path = tmp_path / "payload.pickle"
    path.write_bytes(PAYLOADS[kind])
    with pytest.raises(PerPEFTError, match="refused"):
        load_pickle(path)
    with pytest.raises(PerPEFTError, match=str(path)):
        read_hyperparameters("shop", "lora", path)
    for end in ("item2id", "texts"):
        name = f"shop_{end}_final.pickle"
        with refused(folder / name, PAYLOADS[kind], match=name):
            read_dataset(folder, "shop")
    assert_live(pickle.load, PAYLOADS[kind])


CALLS = {
    "NEWOBJ": b"}}\x81.", "NEWOBJ_EX": b"}}}\x92.", "OBJ": b"(}o.", "BUILD": b"}}b.", "REDUCE": b"}}R.", "PERSID": b"Px\n.",
    **{f"EXT{size}": code + CODE.to_bytes(size, "little") + b"." for size, code in ((1, b"\x82"), (2, b"\x83"), (4, b"\x84"))},
}  # fmt: skip
NAMED = (b"cthis\ns\n.", b"\x80\x04\x8c\x04this\x8c\x01s\x93.", b"(ithis\ns\n.")


def test_calls_are_refused_by_name_and_names_never_looked_up(tmp_path):
    """Importing a module runs it, so a name must be refused before it is."""
    path, named = tmp_path / "call.pickle", [("the type this.s", content) for content in NAMED]
    for words, content in [*((f"opcode {name} ", content) for name, content in CALLS.items()), *named]:
        sys.modules.pop("this", None)
        path.write_bytes(content)
        with pytest.raises(PerPEFTError, match=words):
            load_pickle(path)
        assert "this" not in sys.modules


def refuse_every_payload(path, read, error=PerPEFTError, match=None):
    """`read` must raise for every payload in place of a sound file of torch, saved as today or as of old, and read that file."""
    for kind, payload in PAYLOADS.items():
        if "protocol" not in kind or kind[-1] in "24":
            for content in (with_pickle(path, lambda _, payload=payload: payload), payload):
                with refused(path, content, error, match):
                    read()
                assert_live(partial(torch.load, weights_only=False), content)
    read()


def test_hidden_states_with_code_are_refused(folder):
    path = states_path(folder, "shop")
    torch.save((torch.randn(5, 3, 8), torch.randn(5, 3, 4), RAW_IDS), path)
    dataset = read_dataset(folder, "shop")
    refuse_every_payload(path, lambda: HiddenStateStore.open(dataset), match="shop_preX.pt")


@pytest.fixture
def lora_model(tiny_dataset, tiny_run):
    """A model with one group, as the saved run's."""
    options = tiny_options(tiny_dataset, tiny_run.options.clip_model, tiny_run.folder.parent)
    options.device = "cpu"
    return build_model(options, read_dataset(tiny_dataset.train_dir, "tiny"))[0]


@pytest.mark.parametrize(
    "name", ["global/sasrec.pth", "global/projector.pth", "personalized/sasrec.pth", "personalized/group_1/projector.pth"]
)
def test_saved_weights_with_code_are_refused(name, lora_model, copied_run):
    stage = name.split("/")[0]
    if stage == "personalized":
        lora_model.clone_groups(3)
    refuse_every_payload(copied_run.folder / name, partial(load_weights, lora_model, copied_run.folder / stage, stage))


def test_state_to_continue_from_with_code_is_refused(tmp_path):
    path = tmp_path / "global.pt"
    torch.save({"trainer": {}, "progress": {}}, path)
    refuse_every_payload(path, partial(Checkpoint(path, None).restore, mock.Mock(), mock.Mock()), match="global.pt")


def test_iisan_weights_with_code_are_refused(tmp_path):
    encoder = IISANEncoder(IISAN(8, 4, 3))
    save_adapter(encoder, tmp_path, 0)
    read = partial(load_adapter, encoder, tmp_path, 0)
    refuse_every_payload(tmp_path / "iisan.pth", read, pickle.UnpicklingError, "Weights only load failed")


def test_adapters_are_read_as_safetensors_only(lora_model, copied_run):
    adapter = copied_run.folder / "global" / "adapter"
    weights = adapter / "adapter_model.safetensors"
    as_torch = with_pickle(copied_run.folder / "global" / "sasrec.pth", lambda _: PAYLOADS["within a dict"])
    (adapter / "adapter_model.bin").write_bytes(as_torch)  # what peft falls back to
    for content in (as_torch, *PAYLOADS.values()):
        with refused(weights, content):
            load_weights(lora_model, copied_run.folder / "global", "global")
    load_weights(lora_model, copied_run.folder / "global", "global")  # the other file beside it is not read
    as_bin = io.BytesIO()
    torch.save(load_file(weights), as_bin)
    weights.unlink()
    for content in (as_torch, as_bin.getvalue()):  # nor without it, whether it carries code or the very weights
        with refused(adapter / "adapter_model.bin", content):
            load_weights(lora_model, copied_run.folder / "global", "global")


def test_clip_weights_with_code_are_refused(tmp_path):
    clip = save_tiny_clip(tmp_path / "clip", tiny_titles())
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    refuse_every_payload(clip / "pytorch_model.bin", lambda: load_foundation(str(clip)), match="cannot be loaded")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_code_beside_clip_weights_is_not_run(name, known, tmp_path):
    """The library can fetch classes from files that a model brings; none of them is asked for here."""
    clip = save_tiny_clip(tmp_path / "clip", tiny_titles())
    (clip / "own.py").write_text(f"import {__name__} as tests\ntests.RAN.append('imported')\nclass Own: pass\n")
    settings = json.loads((clip / name).read_text())
    own = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor"), "own.Own")
    settings["auto_map"] = own | {"AutoTokenizer": ["own.Own", "own.Own"]}
    if not known:
        settings.update(tokenizer_class="Own", image_processor_type="Own", model_type="own")
    (clip / name).write_text(json.dumps(settings))
    with contextlib.suppress(PerPEFTError):
        load_foundation(str(clip))


@pytest.fixture(scope="module")
def foundation(tiny_clip):
    return load_foundation(str(tiny_clip))


def test_store_with_pickled_arrays_is_refused(folder, foundation):
    dataset = read_dataset(folder, "shop")
    foundation.store(dataset)
    titles, pixels = next((folder / "shop_store").rglob("titles.npz")), next((folder / "shop_store").rglob("images.npy"))
    evil = np.array([Reduced()], dtype=object)
    as_npz, as_npy = io.BytesIO(), io.BytesIO()
    np.savez(as_npz, tokens=evil, lengths=evil)
    np.save(as_npy, evil)
    damaged = [(titles, as_npz.getvalue()), (pixels, as_npy.getvalue()), (titles, as_npy.getvalue())]
    damaged += [(path, path.read_bytes()[:-100]) for path in (titles, pixels)]
    for path, content in damaged:
        with refused(path, content, match="store.*damaged"):
            foundation.store(dataset)
    assert foundation.store(dataset).num_items == 5
    assert_live(partial(np.load, allow_pickle=True), as_npy.getvalue())


WATCHED = []  # for each test that watches, the real paths of files that are opened


def _audit(event, arguments):
    if WATCHED and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        WATCHED[-1].append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_audit)


@pytest.fixture
def opened():
    """The real paths of the files that are opened in this process during a test."""
    WATCHED.append([])
    yield WATCHED[-1]
    WATCHED.pop()


LEADING_AWAY = ["../secret", "..\\secret", "/etc/passwd", "a/../../secret", "./B005", "\\\\host\\share", "C:\\x", "B005\0", "\0"]
ODD = ["..", ".", "...", "~", "~root", "$HOME", "%2e%2e%2f", "a b", "-rf", "|id", "file:x", "‥", "／", "CON", "é"]


@pytest.mark.parametrize("raw_id", [*LEADING_AWAY, *ODD])
def test_raw_ids_stay_inside_their_folder(folder, raw_id, foundation, opened):
    images = folder / "shop_images"
    shutil.copy(images / "B005.jpg", folder / "secret.jpg")
    (images / "B005.jpg").rename(images / (f"{raw_id}.jpg" if raw_id in ODD else image_file_name(raw_id)))
    (folder / "shop_item2id_final.pickle").write_bytes(pickle.dumps(dict(enumerate([*RAW_IDS[:4], raw_id], 1))))
    opened.clear()
    dataset = read_dataset(folder, "shop")
    foundation.store(dataset)
    assert dataset.image_paths[4].parent == images
    assert sorted(path for path in opened if path.endswith(".jpg")) == sorted(str(path.resolve()) for path in dataset.image_paths)
    assert str((folder / "secret.jpg").resolve()) not in opened
    assert [path for path in opened if not path.startswith(str(folder.resolve())) and ".py" not in path] == []


@pytest.mark.parametrize("name", ["../shop", "/shop", "a/shop", "..", ".", "", "shop/", "..\\shop", "shop\0"])
def test_name_of_a_data_set_that_leads_away_is_refused(folder, name, opened, tiny_dataset, tiny_clip):
    inner = folder / "inner"
    inner.mkdir()
    options = ["--dataset", name, "--train_dir", inner]
    for read in (
        partial(read_dataset, inner, name),
        partial(run_script, tiny_arguments(tiny_dataset, tiny_clip, folder / "runs", dataset=name)),
        *(partial(run_script, options, script.main) for script in (check_data, extract_hidden_states)),
    ):
        with pytest.raises(PerPEFTError, match="expected a name, not a path"):
            read()
    assert all(path.endswith("perpeft_hyperparameter.pickle") for path in opened)


@mock.patch.object(subprocess, "Popen")
@mock.patch.object(subprocess, "check_call")
def test_image_that_another_program_would_draw_is_not_handed_to_it(check_call, popen, folder):
    """Pillow passes PostScript to Ghostscript, which has run commands from images."""
    image = folder / "shop_images" / "B001.jpg"
    image.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(OSError, match="not an image of a kind"):
        read_image(image, CLIPImageProcessor())
    assert not check_call.called and not popen.called


@pytest.fixture
def network(monkeypatch):
    """What every way out of this process is replaced by: an error."""
    ways = mock.Mock(side_effect=OSError("a test must not reach the network"))
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, ways)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, ways)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # nothing but the code keeps it inside
    return ways


def test_local_data_and_a_local_clip_reach_for_nothing(folder, tiny_clip, network, monkeypatch):
    dataset = read_dataset(folder, "shop")
    store = load_foundation(str(tiny_clip)).store(dataset)
    assert store.fetch(np.array([1, 5]), CPU)[0].shape == (2, 3, 32, 32)
    ensure_hidden_states(dataset, str(tiny_clip), CPU)
    assert HiddenStateStore.open(dataset).num_items == 5
    assert not network.called
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the hub's client tries again and again
    with pytest.raises(PerPEFTError, match="cannot be loaded"):
        load_foundation("nobody/no-such-model-at-all")
    assert network.called  # so this test sees who reaches for the hub


@pytest.mark.parametrize("peft_type", ["lora", "ia3"])
def test_a_model_is_trained_and_saved_without_the_network(peft_type, tiny_dataset, tiny_clip, tmp_path, network):
    run_script(tiny_arguments(tiny_dataset, tiny_clip, tmp_path / "runs", peft_type, global_epochs=1, num_epochs=1, C=2))
    assert not network.called
