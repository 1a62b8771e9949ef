"""The store holds, bit for bit, what CLIP's own processors make of images and titles, and is built whole or not at all."""
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor

from models.towers import Traits
from tests.conftest import encoded, write_dataset
from tests.items.families import CROPPED, SQUARE
from utils.common.errors import PerPEFTError
from utils.common.files import build_once
from utils.data.dataset import read_dataset
from utils.items import store as items_module
from utils.items.preprocessing import read_image
from utils.items.store import ImageTitleStore

CPU = torch.device("cpu")
TITLES = [f"red lamp number {number}" for number in range(11, 0, -1)] + ["very long title " * 20]  # the first ones are longer
SIDES = (
    (2, 7), (7, 2), (1, 1), (3, 3), (4, 3), (3, 4), (1, 9), (9, 1), (32, 32), (31, 33), (33, 31), (199, 5), (5, 199), (224, 224),
    (225, 224), (500, 333), (333, 500), (221, 447), (1000, 999),
)  # fmt: skip
PROCESSORS = {
    "32": CLIPImageProcessor(**CROPPED),
    "224": CLIPImageProcessor(),
    "crop smaller than the edge": CLIPImageProcessor(size={"shortest_edge": 41}, crop_size={"height": 30, "width": 20}),
    "size as height and width": CLIPImageProcessor(size={"height": 30, "width": 50}, crop_size={"height": 25, "width": 25}),
    "crop larger than the edge": CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 32, "width": 33}),
    "nearest neighbour": CLIPImageProcessor(**CROPPED, resample=0),
    "no resize": CLIPImageProcessor(do_resize=False, crop_size=SQUARE),
}


def noise(width, height, mode="RGB", seed=0):
    """An image of noise, on which any slip in resizing or cropping shows."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # an orientation, which CLIP's processor does not follow
FILES = {  # images as shops have them; deep and transparent ones are in tests/data/test_images.py
    **{f"{mode} png": encoded(noise(37, 61, mode), "PNG") for mode in ("RGB", "L", "1", "P")},
    **{f"{mode} jpeg": encoded(noise(70, 45, mode)) for mode in ("CMYK", "L")},
    "gif": encoded(noise(50, 33, "P"), "GIF"),
    "progressive jpeg": encoded(noise(64, 90), progressive=True),
    "jpeg with orientation": encoded(noise(64, 90), exif=TURNED),
    **{f"jpeg with subsampling {factor}": encoded(noise(101, 67), quality=70, subsampling=factor) for factor in (0, 1, 2)},
    **{f"{width} x {height}": encoded(noise(width, height), "PNG") for width, height in SIDES},
}


def original(processor, path):
    """What transformers makes of an image; the data format is named where it would take 1 or 3 rows for channels."""
    image = Image.open(path).convert("RGB")
    options = {"input_data_format": "channels_last"} if image.height in (1, 3) else {}
    return processor(image, do_rescale=False, do_normalize=False, return_tensors="np", **options)["pixel_values"][0]


@pytest.mark.parametrize("setting", PROCESSORS)
def test_images_are_bit_for_bit_what_clips_processor_leaves(setting, tmp_path):
    path, processor = tmp_path / "image.jpg", PROCESSORS[setting]
    for name, data in FILES.items():
        path.write_bytes(data)
        found = read_image(path, processor)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, original(processor, path), err_msg=f"{name} by {setting}")


@pytest.mark.filterwarnings("ignore:.*decompression bomb")
def test_image_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(Image.new("1", (12_000, 12_000)), "PNG"))  # 20 kB on disk, 432 MB as RGB; Pillow only warns
    with pytest.raises(ValueError, match="12000 x 12000"):
        read_image(path, PROCESSORS["32"])


@pytest.fixture(scope="module")
def tokenizer(tiny_clip):
    return AutoTokenizer.from_pretrained(tiny_clip)


@pytest.fixture
def shop(tmp_path):
    return write_dataset(tmp_path / "data", "shop", {1: [1, 2, 3, 4], 2: list(range(5, 13))}, TITLES)


def open_store(folder, tokenizer, processor=PROCESSORS["32"], missing_images="error", max_tokens=16):
    dataset = read_dataset(folder, "shop", missing_images=missing_images)
    return ImageTitleStore.open(dataset, processor, tokenizer, Traits(longest_title=max_tokens), missing_images)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are decoded, as they are."""
    names = []
    monkeypatch.setattr(items_module, "read_image", lambda path, *options: names.append(path.name) or read_image(path, *options))
    return names


def image_path(folder, item):
    return folder / "shop_images" / f"B{item:03d}.jpg"


@pytest.mark.parametrize("changed", ["nothing", "image", "title"])
@pytest.mark.parametrize(("setting", "max_tokens"), [("32", 16), ("nearest neighbour", 16), ("crop smaller than the edge", 5)])
@mock.patch.object(items_module, "fits_on", lambda device, *arrays: True)
def test_store_holds_every_items_own_image_and_title_whatever_was_stored_before(shop, tokenizer, changed, setting, max_tokens):
    open_store(shop, tokenizer)
    image, texts = image_path(shop, 4), shop / "shop_texts_final.pickle"
    titles = pickle.loads(texts.read_bytes())
    if changed == "image":
        status = image.stat()
        image.write_bytes(encoded(noise(8, 8)).ljust(status.st_size, b"\0"))  # a file of the same size
        os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif changed == "title":
        titles["B001"] = "another title"
        texts.write_bytes(pickle.dumps(titles))
    store = open_store(shop, tokenizer, PROCESSORS[setting], max_tokens=max_tokens)
    uncut = [tokenizer(titles[f"B{item:03d}"])["input_ids"] for item in range(1, 13)]
    own = [tokens[:-1][: max_tokens - 1] + [tokenizer.eos_token_id] for tokens in uncut]
    assert len(own[-1]) < len(uncut[-1])  # the last title is cut
    order = store.reading_order()
    assert order.tolist() == sorted(range(1, 13), key=lambda item: len(own[item - 1]))
    for batch, placed in ((order[:1], False), (order[1:6], False), (order[6:], False), (order[3:8], True)):
        if placed:
            store.place_on(CPU)  # as on a GPU
        pixels, tokens = store.fetch(batch, CPU)
        longest = max(len(own[item - 1]) for item in batch)
        assert (pixels.dtype, tokens.dtype) == (torch.uint8, torch.int64)
        for item, found, row in zip(batch, pixels.numpy(), tokens.tolist(), strict=True):
            np.testing.assert_array_equal(found, original(PROCESSORS[setting], image_path(shop, item)))
            assert row == own[item - 1] + [tokenizer.pad_token_id] * (longest - len(own[item - 1]))


def files_of_stores(folder):
    """Whatever lies in the stores' folder, but for the locks of processes that build at the same time."""
    return [path for path in (folder / "shop_store").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_bad_images_are_all_reported_at_once_and_leave_no_half_store_or_are_blank_on_request(shop, tokenizer, decoded, capsys):
    path = image_path(shop, 2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    image_path(shop, 5).write_bytes(b"")
    image_path(shop, 9).write_bytes(b"this is text")
    with pytest.raises(PerPEFTError, match=r"\(3\): B002.jpg \(item 2: .*, B005.jpg \(item 5: .*, B009.jpg \(item 9: "):
        open_store(shop, tokenizer)
    assert files_of_stores(shop) == []
    open_store(shop, tokenizer, missing_images="blank")
    with pytest.raises(PerPEFTError, match="B002.jpg"):  # a store with blanks is not taken for a whole one
        open_store(shop, tokenizer)
    image_path(shop, 11).unlink()
    capsys.readouterr()
    store = open_store(shop, tokenizer, missing_images="blank")
    warnings = capsys.readouterr().err
    assert [warnings.count(f"B{item:03d}") for item in (1, 2, 5, 9, 11)] == [0, 1, 1, 1, 1]
    for item in range(1, 13):
        assert bool(store.pixels[item - 1].any()) == (item not in (2, 5, 9, 11))
    for item in (2, 5, 9, 11):
        noise(20, 20, seed=item).save(image_path(shop, item))
    decoded.clear()
    for _ in range(2):
        assert len(open_store(shop, tokenizer).pixels) == 12 and len(decoded) == 12  # each image once


def test_store_that_cannot_be_written_is_reported_and_leaves_no_half_of_it(shop, tokenizer, monkeypatch):
    (shop / "shop_store").write_text("a file where the folder would be")
    with pytest.raises(PerPEFTError, match="the image store .*shop_store/.* cannot be written"):
        open_store(shop, tokenizer)
    (shop / "shop_store").unlink()
    full = mock.Mock(side_effect=OSError(28, "No space left on device"))
    with mock.patch.object(os, "posix_fallocate", full), pytest.raises(PerPEFTError, match="No space left"):
        open_store(shop, tokenizer)
    assert files_of_stores(shop) == []
    monkeypatch.delattr(os, "posix_fallocate")  # macOS, where --device mps runs, has none
    assert len(open_store(shop, tokenizer).pixels) == 12


def test_two_runs_that_build_the_store_at_the_same_time_both_get_it_and_decode_once(shop, tiny_clip, decoded, monkeypatch):
    both = threading.Barrier(2, timeout=60)  # neither looks for a store before the other does
    monkeypatch.setattr(items_module, "build_once", lambda folder: (both.wait(), build_once(folder))[1])
    with ThreadPoolExecutor() as pool:
        stores = list(pool.map(lambda _: open_store(shop, AutoTokenizer.from_pretrained(tiny_clip)), range(2)))
    assert len(decoded) == 12
    for store in stores:
        np.testing.assert_array_equal(store.pixels[0], original(PROCESSORS["32"], image_path(shop, 1)))
