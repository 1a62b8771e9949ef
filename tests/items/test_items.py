"""The store holds, bit for bit, what CLIP's own processors make of images and titles, and is built whole or not at all."""
import io
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from models import ClipPeftEncoder
from models.peft_configs import peft_config
from models.towers import Traits
from tests.conftest import encoded, write_dataset
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.items import store as items_module
from utils.items.preprocessing import read_image
from utils.items.store import ImageTitleStore

pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")
CPU = torch.device("cpu")
MAX_TOKENS = 16


def noise(mode, width, height, seed=0):
    """An image of noise, on which any slip in resizing or cropping shows."""
    random = np.random.default_rng(seed)
    if mode == "1":
        return Image.fromarray(random.random((height, width)) > 0.5).convert("1")
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 600, (height, width), dtype=np.uint16))
    if mode == "P":
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).quantize(64)
        image.info["transparency"] = 3
        return image
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, (width, height), random.bytes(width * height * bands))


def image_files():
    """{name: file bytes} of images as shops have them, and as they should not."""
    files = {f"{mode} png": encoded(noise(mode, 37, 61), "PNG") for mode in ("RGB", "L", "LA", "RGBA", "1", "I;16")}
    files["P with transparency"] = encoded(noise("P", 40, 50), "PNG", transparency=3)
    files["P with a transparency table"] = encoded(noise("P", 40, 50), "PNG", transparency=bytes(range(64)))
    files["CMYK jpeg"] = encoded(noise("CMYK", 45, 70), "JPEG")
    files["L jpeg"] = encoded(noise("L", 70, 45), "JPEG")
    files["gif"] = encoded(noise("P", 50, 33), "GIF")
    files["float tiff"] = encoded(Image.fromarray(np.linspace(0, 300, 2000, dtype=np.float32).reshape(40, 50)), "TIFF")
    for subsampling in (0, 1, 2):
        jpeg = encoded(noise("RGB", 101, 67, subsampling), "JPEG", quality=70, subsampling=subsampling)
        files[f"jpeg with subsampling {subsampling}"] = jpeg
    files["progressive jpeg"] = encoded(noise("RGB", 64, 90), "JPEG", progressive=True)
    turned = Image.Exif()
    turned[0x0112] = 6  # an orientation, which CLIP's processor does not follow
    files["jpeg with orientation"] = encoded(noise("RGB", 64, 90), "JPEG", exif=turned)
    sides = ((2, 7), (7, 2), (1, 1), (3, 3), (4, 3), (3, 4), (1, 9), (9, 1), (32, 32), (31, 33), (33, 31), (999, 5), (5, 999))
    for width, height in sides:
        files[f"{width} x {height}"] = encoded(noise("RGB", width, height), "PNG")
    for width, height in ((224, 224), (225, 224), (500, 333), (333, 500), (221, 447), (1000, 999)):
        files[f"{width} x {height}"] = encoded(noise("RGB", width, height), "JPEG", quality=95)
    return files


FILES = image_files()
PROCESSORS = {
    "32": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    "224": CLIPImageProcessor(),
    "crop smaller than the edge": CLIPImageProcessor(size={"shortest_edge": 41}, crop_size={"height": 30, "width": 20}),
    "size as height and width": CLIPImageProcessor(size={"height": 30, "width": 50}, crop_size={"height": 25, "width": 25}),
    "crop larger than the edge": CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 32, "width": 33}),
    "nearest neighbour": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=0),
    "no resize": CLIPImageProcessor(do_resize=False, crop_size={"height": 32, "width": 32}),
}


def original(processor, data, **options):
    """What transformers makes of an image. Its data format is said where the processor would take 1 or 3 rows for channels."""
    image = Image.open(io.BytesIO(data))
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        image = image.point(lambda value: value / 257 + 0.5).convert("L")
    elif image.mode in ("LA", "RGBA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    return processor(image, return_tensors="np", input_data_format="channels_last", **options)["pixel_values"][0]


@pytest.mark.parametrize("setting", PROCESSORS)
def test_images_are_bit_for_bit_what_clips_processor_leaves(setting, tmp_path):
    processor = PROCESSORS[setting]
    for name, data in FILES.items():
        if setting == "224" and name in ("999 x 5", "5 x 999"):
            continue  # 45,000 pixels long after the resize; the other settings have them
        path = tmp_path / "image.jpg"
        path.write_bytes(data)
        expected = original(processor, data, do_rescale=False, do_normalize=False)
        found = read_image(path, processor)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, expected, err_msg=f"{name} by {setting}")
        image = Image.open(path)
        special = image.mode in ("I;16", "F", "LA", "RGBA") or "transparency" in image.info  # see `to_rgb`
        if image.height > 4 and not special:  # the lowest images' channels the processor would mistake
            unaided = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
            np.testing.assert_array_equal(found, unaided, err_msg=name)


def test_pixel_values_by_way_of_the_store_are_the_processors(tmp_path, tiny_clip):
    processor = CLIPImageProcessor.from_pretrained(tiny_clip)
    encoder = ClipPeftEncoder(CLIPModel.from_pretrained(tiny_clip), peft_config("lora"), processor)
    seen = []
    patches = next(module for module in encoder.modules() if isinstance(module, torch.nn.Conv2d))
    patches.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    path = tmp_path / "image.jpg"
    for name, data in FILES.items():
        path.write_bytes(data)
        pixels = torch.from_numpy(read_image(path, processor).copy())[None]
        with torch.no_grad():
            encoder(pixels, torch.tensor([[1, 2, 3]]))
        np.testing.assert_allclose(seen[-1][0].numpy(), original(processor, data), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.filterwarnings("ignore:.*decompression bomb")
def test_image_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(Image.new("1", (12_000, 12_000)), "PNG"))  # 20 kB on disk, 432 MB as RGB; Pillow only warns
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="12000 x 12000"):
        read_image(path, PROCESSORS["32"])


# ---------------------------------------------------------------- the store


@pytest.fixture(scope="module")
def tokenizer(tiny_clip):
    return AutoTokenizer.from_pretrained(tiny_clip)


@pytest.fixture
def shop(tmp_path):
    """A data set of 12 items, fresh for every test."""
    titles = [f"red lamp number {item}" for item in range(1, 12)] + ["very long title " * 20]
    return write_dataset(tmp_path / "data", "shop", {1: [1, 2, 3, 4], 2: list(range(5, 13))}, titles)


def open_store(folder, tokenizer, processor=PROCESSORS["32"], missing_images="error", max_tokens=MAX_TOKENS):
    dataset = read_dataset(folder, "shop", missing_images=missing_images)
    return ImageTitleStore.open(dataset, processor, tokenizer, Traits(longest_title=max_tokens), missing_images)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that are decoded, as they are."""
    names = []

    def remember(path, processor):
        names.append(os.path.basename(path))
        return read_image(path, processor)

    monkeypatch.setattr(items_module, "read_image", remember)
    return names


def image_path(folder, item):
    return folder / "shop_images" / f"B{item:03d}.jpg"


def test_fetch_is_no_longer_than_the_longest_title_of_the_batch(shop, tokenizer):
    store = open_store(shop, tokenizer)
    lengths = [len(tokenizer(f"red lamp number {item}")["input_ids"]) for item in range(1, 12)] + [MAX_TOKENS]
    for batch in ([1, 2, 3], [12], [4, 12], [10, 11]):
        pixels, tokens = store.fetch(np.array(batch), CPU)
        assert (pixels.dtype, tokens.dtype) == (torch.uint8, torch.int64)
        assert tokens.shape[1] == max(lengths[item - 1] for item in batch)
        assert (tokens[0, lengths[batch[0] - 1] :] == tokenizer.pad_token_id).all()
    order = store.reading_order()
    assert sorted(order.tolist()) == list(range(1, 13))
    assert (np.diff([lengths[item - 1] for item in order]) >= 0).all()


def test_store_is_decoded_once(shop, tokenizer, decoded):
    first = open_store(shop, tokenizer)
    assert sorted(decoded) == [f"B{item:03d}.jpg" for item in range(1, 13)]
    decoded.clear()
    again = open_store(shop, tokenizer)
    assert decoded == []
    np.testing.assert_array_equal(again.pixels, first.pixels)
    np.testing.assert_array_equal(again.tokens, first.tokens)


def change_nothing(folder):
    pass


def change_image(folder):
    path = image_path(folder, 4)
    status = path.stat()
    noise("RGB", 40, 40).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def change_title(folder):
    path = folder / "shop_texts_final.pickle"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()) | {"B001": "another title"}))


@pytest.mark.parametrize("change", [change_nothing, change_image, change_title])
@pytest.mark.parametrize(
    ("setting", "max_tokens"), [("32", MAX_TOKENS), ("nearest neighbour", MAX_TOKENS), ("crop smaller than the edge", 5)]
)
def test_store_holds_every_items_own_image_and_title_whatever_was_stored_before(shop, tokenizer, change, setting, max_tokens):
    open_store(shop, tokenizer)
    change(shop)
    store = open_store(shop, tokenizer, PROCESSORS[setting], max_tokens=max_tokens)
    assert store.num_items == 12
    titles = pickle.loads((shop / "shop_texts_final.pickle").read_bytes())
    for item in range(1, 13):
        pixels, tokens = store.fetch(np.array([item]), CPU)
        expected = original(PROCESSORS[setting], image_path(shop, item).read_bytes(), do_rescale=False, do_normalize=False)
        np.testing.assert_array_equal(pixels[0].numpy(), expected)
        uncut = tokenizer(titles[f"B{item:03d}"])["input_ids"]
        assert tokens[0].tolist() == uncut[:-1][: max_tokens - 1] + [tokenizer.eos_token_id]
    assert len(uncut) > MAX_TOKENS  # the last title is cut


def files_of_stores(folder):
    """Whatever lies in the stores' folder, but for the locks of processes that build at the same time."""
    return [path for path in (folder / "shop_store").rglob("*") if path.is_file() and path.suffix != ".lock"]


def damage(folder):
    """Leave three bad images in three ways."""
    path = image_path(folder, 2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    image_path(folder, 5).write_bytes(b"")
    image_path(folder, 9).write_bytes(b"this is text")
    return ["B002.jpg", "B005.jpg", "B009.jpg"]


def test_bad_images_are_all_reported_at_once_and_leave_no_half_store(shop, tokenizer, decoded):
    bad = damage(shop)
    with pytest.raises(PerPEFTError) as raised:
        open_store(shop, tokenizer)
    assert "(3)" in str(raised.value)
    for name, item in zip(bad, (2, 5, 9)):
        assert f"{name} (item {item}" in str(raised.value)
    assert files_of_stores(shop) == []
    for item in (2, 5, 9):
        noise("RGB", 20, 20, item).save(image_path(shop, item))
    decoded.clear()
    assert len(open_store(shop, tokenizer).pixels) == 12 and len(decoded) == 12


def test_blank_images_replace_missing_ones_on_request(shop, tokenizer):
    damage(shop)
    image_path(shop, 11).unlink()
    store = open_store(shop, tokenizer, missing_images="blank")
    for item in range(1, 13):
        assert bool(store.pixels[item - 1].any()) == (item not in (2, 5, 9, 11))
    with pytest.raises(PerPEFTError, match="B011.jpg"):  # a store with blanks is not taken for a whole one
        open_store(shop, tokenizer)


def test_failure_on_the_way_leaves_no_half_store(shop, tokenizer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(items_module.os, "posix_fallocate", full)
        with pytest.raises(PerPEFTError, match="No space left"):
            open_store(shop, tokenizer)
    assert files_of_stores(shop) == []
    assert len(open_store(shop, tokenizer).pixels) == 12


def test_system_without_posix_fallocate_builds_the_store_all_the_same(shop, tokenizer, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")  # macOS, where --device mps runs, has none
    assert len(open_store(shop, tokenizer).pixels) == 12


def test_two_runs_that_build_the_store_at_the_same_time_both_get_it_and_decode_once(shop, tiny_clip, decoded, monkeypatch):
    """Several seeds started at once is the usual way to use a machine; here the second comes while the first is building."""
    original_write, others, stores = items_module._write_images, [], []

    def other_run():
        stores.append(open_store(shop, AutoTokenizer.from_pretrained(tiny_clip)))

    def write(*arguments):
        if not others:
            others.append(threading.Thread(target=other_run))
            others[0].start()
            others[0].join(timeout=1)  # until it has done all it can do meanwhile: everything, or nothing but wait
        original_write(*arguments)

    monkeypatch.setattr(items_module, "_write_images", write)
    stores.append(open_store(shop, AutoTokenizer.from_pretrained(tiny_clip)))
    others[0].join()
    expected = original(PROCESSORS["32"], image_path(shop, 1).read_bytes(), do_rescale=False, do_normalize=False)
    assert len(stores) == 2
    for store in stores:
        np.testing.assert_array_equal(store.pixels[0], expected)
    assert len(decoded) == 12


def test_folder_that_cannot_be_written_is_reported(shop, tokenizer):
    (shop / "shop_store").write_text("a file where the folder would be")
    with pytest.raises(PerPEFTError, match="shop_store"):
        open_store(shop, tokenizer)
