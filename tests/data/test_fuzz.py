"""Hundreds of damaged versions of each kind of input file: they are read or refused in a sentence, fast and in little memory.

Each kind is read in a copy of this process, so that a crash, a reader that never ends or one that fills the memory is a failed
test instead of the end of all tests. `python -m tests.data.test_fuzz KIND SEED` reads one input.
"""
import faulthandler
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from models.towers import Traits
from tests.conftest import draw_image, encoded, write_dataset
from tests.data.test_unzip import METHODS, below, zip_bytes
from tests.forks import in_a_fork
from tests.torch_files import with_pickle
from utils.common.errors import PerPEFTError
from utils.data.archives import unpack_all
from utils.data.dataset import read_dataset
from utils.items.hidden_states import HiddenStateStore
from utils.items.preprocessing import read_image
from utils.items.store import ImageTitleStore
from utils.prepare.small_tokenizer import train_tokenizer

INPUTS = int(os.environ.get("FUZZ_INPUTS", 250))  # of each kind; most findings came with 2,000
SECONDS_AN_INPUT = 10.0  # where others share the machine; alone, the slowest takes one
IN_PLACE = ("final.txt", "item2id_final.pickle", "texts_final.pickle")
KINDS = (*IN_PLACE, "preX.pt", "zip", "image")
# How far the process may grow. An image may have BOMB_PIXELS, four bytes each; the rest may not go beyond the file by much.
MEGABYTES = dict.fromkeys(KINDS, 150) | {"image": 1300}
ROOM = 3 * 2**30  # of addresses, beyond those that the libraries take; MEGABYTES limits the memory that is really used
ITEMS = 12
SPECIAL_BYTES = (
    b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff", b"\0\0\0\x7f", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff",
    b"\xed\xa0\x80", b"-", b"--", b"9", b".",
)  # fmt: skip


def damaged(bases, seed):
    """One of some files with one to four pieces of damage, or more until it differs from all of them; a function of the seed."""
    source = random.Random(seed)
    content = bytearray(source.choice(bases))
    pieces = source.choice((1, 1, 1, 2, 4))
    while pieces > 0 or content in bases:
        pieces -= 1
        start = source.randrange(len(content) + 1)
        size = len(content[start : start + 2 ** source.randrange(10)])
        noise, special, other = source.randbytes(size), source.choice(SPECIAL_BYTES), source.choice(bases)
        begin = source.randrange(len(other))
        between, some, bit = slice(start, start), slice(start, start + size), slice(start, start + 1)
        place, piece = source.choice((
            (bit, bytes(value ^ 1 << source.randrange(8) for value in content[bit])),  # a flipped bit
            (slice(start, None), b""),  # cut off
            (between, noise),  # something put in between
            (some, b""),  # something left out
            (some, other[begin : begin + 2 ** source.randrange(10)]),  # a piece of another file, or of another place
            (some, bytes(size)),  # zeros, as a file system leaves them after a crash
            (between, content[some]),  # a piece twice
            (some, noise),  # random bytes
            (slice(start, start + source.choice((0, len(special)))), special),  # lengths, signs and ends that mean something
        ))  # fmt: skip
        content[place] = piece
    return bytes(content)


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Reader:
    """Sound files of a small data set, and methods that put a damaged one in place and read it.

    They raise PerPEFTError for one that is refused, and AssertionError for one that was read wrongly.
    """

    def __init__(self, folder):
        self.folder, self.raw_ids = folder, [f"B{item:03d}" for item in range(1, ITEMS + 1)]
        titles = [f"red lamp number {item}" for item in range(1, ITEMS)] + ["Lämpchen 灯"]
        histories = {user: [1 + (user + step) % ITEMS for step in range(user)] for user in (9, 2, 5, 7, 3)}
        write_dataset(folder, "shop", histories, titles)
        self.tokenizer = train_tokenizer(titles, vocab_size=300, max_tokens=16)
        self.processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        self.dataset = read_dataset(folder, "shop")
        images, texts = self.states = torch.randn(ITEMS, 3, 8), torch.randn(ITEMS, 3, 4)
        padded = [torch.cat([states[:1], states]) for states in self.states]
        lines, image = self.path("final.txt").read_bytes(), draw_image(1)
        self.members = {"shop_final.txt": lines, "shop_texts_final.pickle": bytes(range(256)), "shop_images/B001.jpg": b"p" * 700}
        raw_ids, title_of = dict(enumerate(self.raw_ids, 1)), dict(zip(self.raw_ids, titles))
        self.sound = {
            "final.txt": [lines, lines.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + lines.replace(b" ", b"\t")],
            "item2id_final.pickle": [pickle.dumps(raw_ids, protocol) for protocol in range(6)],
            "texts_final.pickle": [pickle.dumps(title_of, protocol) for protocol in range(6)],
            "preX.pt": [
                saved((images, texts, self.raw_ids)), saved([images.half(), texts.double(), tuple(self.raw_ids)]),
                saved((*padded, [0, *self.raw_ids])),
            ],
            "zip": [zip_bytes(below("data/", self.members), method) for method in METHODS],
            "image": [
                *(encoded(image, "JPEG", **options) for options in ({"quality": 75}, {"quality": 95}, {"progressive": True})),
                encoded(image.convert("CMYK"), "JPEG"), encoded(image.convert("L"), "JPEG", optimize=True),
                encoded(image, "PNG"), encoded(image, "WEBP"), encoded(image.quantize(16), "GIF"),
                encoded(image, "TIFF", compression="raw"),
                encoded(Image.new("1", (3000, 2000)), "TIFF", compression="group4"),
            ],
        }  # fmt: skip

    def path(self, end):
        return self.folder / f"shop_{end}"

    def read(self, kind, seed):
        """Read one damaged input."""
        others = {"preX.pt": self.read_states, "zip": self.read_zip, "image": self.read_image}
        others.get(kind, partial(self.read_in_place, self.path(kind)))(damaged(self.sound[kind], seed), seed)

    def read_in_place(self, path, content, seed):
        sound = path.read_bytes()
        path.write_bytes(content)
        missing_images = "blank" if seed % 10 else "error"  # "error" also tries all images, which takes longest
        try:
            dataset = read_dataset(self.folder, "shop", missing_images=missing_images, num_groups=2)
        finally:
            path.write_bytes(sound)
        items = dataset.histories.items
        assert 1 <= items.min() <= items.max() <= dataset.num_items and dataset.histories.lengths.sum() == len(items)
        assert len(dataset.raw_ids) == len(dataset.titles) == len(dataset.image_paths) == len(set(dataset.raw_ids))
        assert all(title.strip() and title.encode() for title in dataset.titles)
        assert all(path.parent == self.path("images") for path in dataset.image_paths)

    def read_states(self, content, seed):
        whole_file = seed % 2 == 0
        if not whole_file:  # a file with right checksums that says wrong things of its contents: damage by intent
            sound = io.BytesIO(random.Random(seed).choice(self.sound["preX.pt"]))
            content = with_pickle(sound, lambda content: damaged([content], seed))
        self.path("preX.pt").write_bytes(content)
        store = HiddenStateStore.open(self.dataset)
        image_states, text_states = store.fetch(np.arange(1, ITEMS + 1), torch.device("cpu"))
        assert torch.isfinite(image_states).all() and torch.isfinite(text_states).all()
        if whole_file:  # what was read in spite of the damage is what was written
            assert torch.allclose(image_states, self.states[0], atol=1e-2) and torch.allclose(text_states, self.states[1])

    def read_zip(self, content, _):
        around, target = self.folder / "around", self.folder / "around" / "dataset"
        shutil.rmtree(around, ignore_errors=True)
        around.mkdir()
        archive = around / "mmrec_datasets.zip"
        archive.write_bytes(content)
        try:
            unpack_all(archive, target)
        except PerPEFTError as error:
            assert list(around.iterdir()) == [archive]  # nothing half-written, nothing lost
            assert "\n" not in str(error)
            raise
        assert list(around.iterdir()) == [target]  # nothing written elsewhere
        contents = {path.read_bytes() for path in target.rglob("*") if path.is_file()}
        assert contents == set(self.members.values())  # a damaged name can pass, but nothing is damaged or left out

    def read_image(self, content, seed):
        """An image's reader has errors of its own, which the store turns into the project's; every 50th time a store is made."""
        path = self.folder / "shop_images" / f"{self.raw_ids[seed % ITEMS]}.jpg"
        path.write_bytes(content)
        if seed % 50 == 49:
            self.make_store()
        try:
            pixels = read_image(path, self.processor)
        except (OSError, ValueError) as error:
            raise PerPEFTError(str(error)) from error
        assert pixels.shape == (3, 32, 32) and pixels.dtype == np.uint8

    def make_store(self):
        shutil.rmtree(self.folder / "shop_store", ignore_errors=True)
        traits = Traits(longest_title=16)
        store = ImageTitleStore.open(self.dataset, self.processor, self.tokenizer, traits, missing_images="blank")
        assert store.pixels.shape == (ITEMS, 3, 32, 32)
        try:
            ImageTitleStore.open(self.dataset, self.processor, self.tokenizer, traits)
        except PerPEFTError as error:
            assert ".jpg (item" in str(error)


def peak_kilobytes():
    """The most memory that this process has held; `getrusage` would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def read_all(reader, kind, write):
    """Read the inputs of one kind; every failure is recorded with its seed."""
    os.fsync = lambda _: None  # what counts here is not that it lasts
    signal.alarm(500)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before, outcomes, wrong, slowest = peak_kilobytes(), Counter(), [], (0.0, None)
    for seed in range(INPUTS):
        write(seed)
        faulthandler.dump_traceback_later(6 * SECONDS_AN_INPUT, exit=True)
        started = time.monotonic()
        try:
            reader.read(kind, seed)
            outcomes["read"] += 1
        except PerPEFTError as error:
            outcomes["refused"] += 1
            if not str(error) or len(str(error)) > 5000:
                wrong.append(f"seed {seed}: a message of {len(str(error))} characters")
            if "MemoryError" in "".join(traceback.format_exception(error)):
                wrong.append(f"seed {seed}: more than {ROOM} bytes were asked for")
        except Exception:
            wrong.append(f"seed {seed}: {traceback.format_exc()[-1500:]}")
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, (time.monotonic() - started, seed))
    megabytes = (peak_kilobytes() - before) // 1024
    write(json.dumps({"outcomes": outcomes, "wrong": wrong, "slowest": slowest, "megabytes": megabytes}))


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return Reader(tmp_path_factory.mktemp("fuzz") / "dataset")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_refused_or_read_in_bounded_time_and_memory(kind, reader):
    written, code = in_a_fork(partial(read_all, reader, kind), addresses=ROOM)
    *_, last = written.splitlines()
    assert code == 0, f"exit code {code} at input {last}"
    result = json.loads(last)
    print(kind, result)
    assert not result["wrong"], "\n".join(result["wrong"][:5])
    assert sum(result["outcomes"].values()) == INPUTS
    assert result["outcomes"]["refused"] > INPUTS // 10  # the damage reaches what is read
    assert result["outcomes"].get("read", 0) > 0  # and some of it is harmless, so the files are sound without it
    assert result["slowest"][0] < SECONDS_AN_INPUT
    assert result["megabytes"] < MEGABYTES[kind]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        Reader(Path(folder) / "dataset").read(sys.argv[1], int(sys.argv[2]))
