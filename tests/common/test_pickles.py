"""Pickles and torch files made to harm are read or refused in little time and memory; damaged numbers are found."""
import pickle
import re
import zipfile
from struct import pack

import numpy as np
import pytest
import torch

from tests.conftest import RAW_IDS
from tests.forks import in_a_fork
from tests.torch_files import with_pickle
from utils.common.errors import PerPEFTError
from utils.common.pickles import load_pickle
from utils.data.dataset import read_dataset
from utils.items.hidden_states import HiddenStateStore, states_path

DEEP = 300_000  # levels of nesting, of which a third overflow the stack of what follows them by recursion


def verdicts(path, cases, read, **room):
    """{kind: what came of reading it} of contents put at `path`, one after another in a copy of this process."""

    def read_all(write):
        for content in cases.values():
            path.write_bytes(content)
            try:
                write("read", read())
            except PerPEFTError as error:
                write("refused", error)

    written, code = in_a_fork(read_all, **room)
    found = dict(zip(cases, written.splitlines()))
    assert code == 0 and len(found) == len(cases), (code, list(cases)[len(found)])
    assert all("memory" not in verdict.lower() and len(verdict) < 500 for verdict in found.values()), found
    return found


HARMFUL_PICKLES = {
    "a key that takes 2 ** 60 steps to hash": b"\x80\x04}K\x01" + b"2\x86" * 60 + b"K\x01s.",
    "a key that overflows the stack": b"\x80\x04}K\x01" + b"\x85" * DEEP + b"K\x01s.",
    "such a key among several": b"\x80\x04}(K\x01K\x02K\x01" + b"\x85" * DEEP + b"K\x01u.",
    "such a key in the old way": b"(K\x01" + b"\x85" * DEEP + b"K\x01d.",
    "such a member of a set": b"\x80\x04\x8f(K\x01" + b"\x85" * DEEP + b"\x90.",
    "such a member of a frozenset": b"\x80\x04(K\x01" + b"\x85" * DEEP + b"\x91.",
    "an index of two billion in the memo": b"\x80\x02}r" + pack("<I", 2**31 - 1) + b".",
    "the same in text": b"}p200000000\n.",
    "bytes longer than any memory": b"\x80\x04\x8e" + pack("<Q", 2**62) + b"abc.",
    "a text of two gigabytes": b"\x80\x04X" + pack("<I", 2**31 - 1) + b"abc.",
    "a frame of eight gigabytes": b"\x80\x04\x95" + pack("<Q", 2**33) + b"}.",
    "a number of two gigabytes": b"\x80\x04\x8b" + pack("<i", 2**31 - 1) + b"abc.",
    "a number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
    "a bytearray of eight gigabytes": b"\x80\x05\x96" + pack("<Q", 2**33) + b"abc.",
    "a buffer from elsewhere": b"\x80\x05\x97.",
    "very many lists in each other": b"\x80\x04" + b"]" * DEEP + b"a" * (DEEP - 1) + b".",
    "very many marks": b"\x80\x04" + b"(" * DEEP + b".",
    "numbers of one hash for keys": b"\x80\x04}("
    + b"".join(b"\x8a\x0d" + (step * (2**61 - 1)).to_bytes(13, "little") + b"K\x01" for step in range(1, 60_000))
    + b"u.",
    **{f"the value {value!r}": pickle.dumps({"B001": value}) for value in (("a",), 10**40, {1}, bytearray(1), 1j)},
    "sound": pickle.dumps({1: "B001"}),
}


def test_pickle_made_to_harm_is_read_or_refused_in_little_time_and_memory(tmp_path):
    path = tmp_path / "harmful.pickle"
    found = verdicts(path, HARMFUL_PICKLES, lambda: type(load_pickle(path)).__name__, addresses=2**28)
    assert {kind for kind in found if found[kind].startswith("read")} == {"very many lists in each other", "sound"}
    assert all(re.match("read|refused .* is (refused:|not a readable pickle) .* again", verdict) for verdict in found.values())
    assert "is refused" in found["the value ('a',)"]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_read_as_written(tmp_path, protocol):
    shared = ["twice"]
    value = {1: "é\n", "a": [1.5, -(2**62), None, True, [], {}, "x" * 300], "b": [shared, shared]}
    if protocol > 2:  # older ones write bytes as a call
        value["bytes"] = b"\0\xff"
    path = tmp_path / "plain.pickle"
    path.write_bytes(pickle.dumps(value, protocol))
    assert load_pickle(path) == value


def states_file(folder, value, **options):
    path = states_path(folder, "shop")
    torch.save(value, path, **options)
    return path


def sound_states():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, 8, generator=generator), torch.randn(5, 3, 4, generator=generator), RAW_IDS


def open_states(folder, clip_name=None):
    return HiddenStateStore.open(read_dataset(folder, "shop", contents=False), clip_name)


def third_image_states(folder):
    return open_states(folder).fetch(np.array([3]), torch.device("cpu"))[0][0]


def test_flipped_bit_among_the_numbers_is_found(folder):
    """It would leave a plausible number, so that only the checksum shows it."""
    image_states, text_states, _ = sound_states()
    path = states_file(folder, sound_states())
    whole = path.read_bytes()
    for states in (image_states, text_states):
        place = whole.index(states.numpy().tobytes()) + 8  # the lowest byte of the third number
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(PerPEFTError, match="damaged"):
            open_states(folder)
    path.write_bytes(whole)
    assert torch.equal(third_image_states(folder), image_states[2])


def test_file_in_the_format_of_old_torch_is_refused_with_how_to_convert_it(folder):
    states_file(folder, sound_states(), _use_new_zipfile_serialization=False)
    with pytest.raises(PerPEFTError, match="format before version 1.6; convert it by python3 -c") as refused:
        open_states(folder)
    exec(re.search(r'python3 -c "(.*)"', str(refused.value)).group(1), {})
    assert torch.equal(third_image_states(folder), sound_states()[0][2])


def odd_states():
    image_states, text_states, ids = sound_states()
    return {
        "one number a hundred million times": (torch.zeros(1).expand(5, 3, 10**8), text_states, ids),
        "sparse": (image_states.to_sparse(), text_states, ids),
        "whole numbers": (image_states.long(), text_states, ids),
        "eight-bit floats": (image_states.to(torch.float8_e4m3fn), text_states, ids),
        "complex numbers": (image_states + 1j, text_states, ids),
        "no layers": (image_states[:, :0], text_states[:, :0], ids),
        "two dimensions": (image_states[0], text_states[0], ids),
        "ids that are lists": (image_states, text_states, [[raw_id] for raw_id in ids]),
        "ids that are a text": (image_states, text_states, "B0001"),
        "ids that are floats": (image_states, text_states, torch.rand(5)),
        "ids in two dimensions": (image_states, text_states, torch.zeros(5, 1).long()),
        "one id for all": (image_states, text_states, torch.zeros(1).long().expand(10**7)),
        "a row less": (image_states, text_states[:-1], ids),
        "three texts": ("a", "b", "c"),
        "a text": "text",
        "a dict": {"image": image_states, "text": text_states},
        "two parts": (image_states, text_states),
        "one tensor": image_states,
        "nothing": None,
        "an id twice": (image_states, text_states, [*ids[:4], ids[0]]),
    }


@pytest.mark.parametrize("kind", odd_states())
def test_states_that_are_not_what_they_should_be_are_refused(folder, kind):
    path = states_file(folder, odd_states()[kind])
    with pytest.raises(PerPEFTError, match=rf"(?s){re.escape(str(path))}.*to compute it") as refused:
        open_states(folder)
    assert kind != "an id twice" or f"stand twice (1): {RAW_IDS[0]}" in str(refused.value)


STORAGE = b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\n"
DICT = b"\x80\x02ccollections\nOrderedDict\n"
HARMFUL_CONTENTS = {
    "a key that takes 2 ** 60 steps to hash": b"\x80\x02}K\x01q\x01" + b"h\x01\x86q\x01" * 60 + b"K\x01s.",
    "a key that overflows the stack": b"\x80\x02}K\x01" + b"\x85" * DEEP + b"K\x01s.",
    "storage with such a name": STORAGE + b"K\x01" + b"\x85" * DEEP + b"X\x03\0\0\0cpuK\x08tQ.",
    "storage with a name of shared tuples": STORAGE + b"K\x01\x85q\x01" + b"h\x01h\x01\x86q\x01" * 30 + b"X\x03\0\0\0cpuK\x08tQ.",
    "a dict made of such pairs": DICT + b"](K\x01" + b"\x85" * DEEP + b"K\x01\x86e\x85R.",
    "an array of a terabyte": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (2**40).to_bytes(6, "little") + b"\x85R.",
    "a function that is no part of a tensor": b"\x80\x02ctorch\nset_num_threads\nK\x01\x85R.",
}


def test_states_made_to_harm_are_refused_in_little_time_and_memory(folder):
    path = states_file(folder, sound_states())
    cases = {kind: with_pickle(path, lambda _, harm=harm: harm) for kind, harm in HARMFUL_CONTENTS.items()}
    size, huge = b"K\x05K\x03K\x08\x87", b"J\xff\xff\xff\x7fK\x03K\x08\x87"
    cases["a tensor larger than the file"] = with_pickle(path, lambda content: content.replace(size, huge))
    cases["compressed"] = with_pickle(path, lambda content: content, zipfile.ZIP_DEFLATED)
    cases["sound"] = with_pickle(path, lambda content: content)
    dataset = read_dataset(folder, "shop", contents=False)
    found = verdicts(path, cases, lambda: HiddenStateStore.open(dataset).num_items)
    assert found.pop("sound") == "read 5"  # taken apart and put together, the file itself is no reason to refuse
    assert all(verdict.startswith("refused") for verdict in found.values()), found
    assert "uses a tuple twice" in found["storage with a name of shared tuples"]  # which hashing would take seconds


@pytest.mark.parametrize("note", ["", "{", "[]", "null", '"text"', "{}", "[" * 100_000, b"\xff\xfe"])
def test_note_that_does_not_name_the_clip_is_refused(folder, note):
    path = states_file(folder, sound_states())
    path.with_suffix(".json").write_bytes(note if isinstance(note, bytes) else note.encode())
    with pytest.raises(PerPEFTError, match="shop_preX.json"):
        open_states(folder, "some/clip")
