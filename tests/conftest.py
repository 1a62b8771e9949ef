"""Shared by all tests: a tiny data set in the documented files, a tiny random CLIP, and one full run on them."""
import io
import pickle
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import settings
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

import perpeft_lora_ia3
from tests.moments import write_instead_of_drawing
from utils.common.console import run_main
from utils.prepare.small_tokenizer import train_tokenizer
from utils.run.options import parse_options
from utils.run.run import Run
from utils.training.trainer import Trainer

# A shell starts background jobs with SIGINT ignored, and children inherit that; the tests that interrupt need the default.
signal.signal(signal.SIGINT, signal.default_int_handler)
# the same examples every time, no time limit on a busy machine, nothing written beside the code
settings.register_profile("perpeft", derandomize=True, deadline=None, database=None)
settings.load_profile("perpeft")

SHORT_USERS = {3: 1, 11: 2, 17: 3}  # user: interactions; the first two are never evaluated, the third has one training item
NUM_USERS, NUM_ITEMS = 40, 30
SHAPES = ("ellipse", "rectangle", "line")
RUN = "tiny_{}_lr0.001_wd0.0001_seed0"  # the folder's name of a tiny run


def write_dataset(folder, name, histories, titles, raw_ids=None, draw=True):
    """Write the four files of docs/your_data.md; `histories` maps user to items, `titles` belong to items 1, 2, ..."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw_ids = raw_ids or [f"B{item:03d}" for item in range(1, len(titles) + 1)]
    lines = [f"{user} {item}\n" for user, items in histories.items() for item in items]
    (folder / f"{name}_final.txt").write_text("".join(lines))
    (folder / f"{name}_item2id_final.pickle").write_bytes(pickle.dumps(dict(enumerate(raw_ids, 1))))
    known = {raw_id: title for raw_id, title in zip(raw_ids, titles) if title is not None}
    (folder / f"{name}_texts_final.pickle").write_bytes(pickle.dumps(known))
    images = folder / f"{name}_images"
    images.mkdir(exist_ok=True)
    for item, raw_id in enumerate(raw_ids if draw else [], 1):
        draw_image(item).save(images / f"{raw_id}.jpg", quality=90)
    return folder


def draw_image(item):
    """One of three shapes in a colour of its own on an image of an odd size."""
    colour = tuple(int(value) for value in np.random.default_rng(item).integers(0, 256, 3))
    image = Image.new("RGB", (37 + item % 5, 41 + item % 7), tuple(255 - value for value in colour))
    getattr(ImageDraw.Draw(image), SHAPES[item % 3])((6, 8, 30, 33), fill=colour)
    return image


def encoded(image, kind="JPEG", **options):
    """The bytes of an image's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiny_histories():
    """40 users with gaps between their numbers, in three interest clusters of ten items each, some interactions elsewhere."""
    random = np.random.default_rng(7)
    histories = {}
    for user in range(1, NUM_USERS + 1):
        own = 10 * (user % 3) + random.permutation(10) + 1
        other = random.integers(1, NUM_ITEMS + 1, size=3)
        items = np.concatenate([own, other])[random.permutation(13)]
        histories[2 * user] = items[: SHORT_USERS.get(user, random.integers(5, 14))].tolist()
    return histories


def tiny_titles():
    """A title an item; the fifth item has none, the sixth's is longer than the tiny CLIP reads."""
    colours, things = ("red", "green", "blue", "pale"), ("lamp", "mug", "chair", "clock", "bag")
    titles = [f"{colours[item % 4]} {things[item % 5]} number {item}" for item in range(1, NUM_ITEMS + 1)]
    titles[4], titles[5] = None, "one very long title " * 10
    return titles


TITLES = ["a lamp", "a mug", "a chair", "a clock", "a bag"]
RAW_IDS = [f"B{item:03d}" for item in range(1, 6)]


@pytest.fixture
def folder(tmp_path):
    """A small sound data set `shop` of 5 items and 3 users, to be damaged."""
    return write_dataset(tmp_path / "dataset", "shop", {1: [1, 2, 3, 4, 5], 2: [2, 1, 3], 5: [4]}, TITLES)


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory):
    """A data set `tiny` on disk: train_dir, name, histories by user number, titles."""
    histories, titles = tiny_histories(), tiny_titles()
    folder = write_dataset(tmp_path_factory.mktemp("data") / "dataset", "tiny", histories, titles)
    return SimpleNamespace(train_dir=folder, name="tiny", histories=histories, titles=titles)


def adapter_parameters(encoder):
    """The trainable parameters of all groups' adapters."""
    return [parameter for group in range(encoder.num_groups) for parameter in encoder.group_parameters(group).values()]


def can_train(dataset, user):
    """Whether a user has a transition to train on: two interactions, or four where the last two are held out."""
    return len(dataset.histories[user]) not in (0, 1, 3)


def fresh_data(tiny_dataset, folder, *without):
    """A copy of `tiny` without what runs keep beside it, nor files of these patterns."""
    shutil.copytree(tiny_dataset.train_dir, folder, ignore=shutil.ignore_patterns("tiny_store", "tiny_preX*", *without))
    return SimpleNamespace(name="tiny", train_dir=folder)


def save_tiny_clip(folder, titles, seed=0):
    """Save a random two-layer CLIPModel with a tokenizer that knows the titles and an image processor."""
    tokenizer = train_tokenizer([title for title in titles if title], vocab_size=600, max_tokens=16)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
    specials = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={**tower, **specials, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A folder with a random tiny CLIPModel: images 32 x 32 in patches of 16, width 32, 2 layers, projection 16."""
    return save_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny_clip", tiny_titles())


def tiny_arguments(tiny_dataset, tiny_clip, output_dir, peft_type="lora", **changes):
    """The command line of a tiny run: 2 + 2 epochs, 3 groups, a rate at which so few steps learn something."""
    options = {
        "dataset": tiny_dataset.name, "train_dir": tiny_dataset.train_dir, "clip_model": tiny_clip, "output_dir": output_dir,
        "peft_type": peft_type, "device": "cpu", "C": 3, "global_epochs": 2, "num_epochs": 2, "lr": 1e-3, "wdecay": 1e-4,
    }  # fmt: skip
    given = [(f"--{name}", value) for name, value in (options | changes).items() if value is not None]
    return [part for name, value in given for part in ((name,) if value is True else (name, str(value)))]


def iisan_arguments(dataset, clip, output_dir, **changes):
    """`tiny_arguments` for perpeft_iisan.py."""
    return tiny_arguments(dataset, clip, output_dir, peft_type=None, **changes)


def parsed(arguments, peft_types=("lora", "ia3")):
    """The options of a command line."""
    return parse_options("", peft_types, [str(part) for part in arguments])


def tiny_options(*args, **changes):
    """`tiny_arguments`, parsed."""
    return parsed(tiny_arguments(*args, **changes))


def run_script(arguments, main=perpeft_lora_ia3.main):
    """Run a script's main in this process."""
    with mock.patch.object(sys, "argv", ["script", *map(str, arguments)]):
        main()


def trained(dataset, clip, output_dir, **changes):
    """The folder of a run by `tiny_arguments`, the only one in `output_dir`."""
    run_script(tiny_arguments(dataset, clip, output_dir, **changes))
    (folder,) = output_dir.iterdir()
    return folder


def at_call(monkeypatch, owner, name, number, action):
    """Call `action` instead of the `number`-th call of a method from now on."""
    original, count = getattr(owner, name), iter(range(1, 10**6))
    monkeypatch.setattr(owner, name, lambda *args: (action if next(count) == number else original)(*args))


def run_interrupted(arguments, method="_report_epoch", call=1, after=False, owner=Run):
    """Run until a method is called for so many times, and interrupt instead of that call, or after it."""
    original = getattr(owner, method)

    def interrupt(*args):
        if after:
            original(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_call(patch, owner, method, call, interrupt)
        run_script(arguments)


def run_on_folder(module, folder, *arguments):
    """Run the main of a script that reads a run folder, in this process."""
    run_script((folder, *arguments, "--device", "cpu"), module.main)


def exit_code(arguments, main=perpeft_lora_ia3.main):
    """Run a script as a process would, up to its end; 0 where it just returns."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        run_script(arguments, lambda: run_main(main))
    except SystemExit as end:
        return end.code
    finally:
        signal.signal(signal.SIGTERM, handler)
    return 0


@pytest.fixture
def no_drawing(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", write_instead_of_drawing)


@pytest.fixture(scope="session")
def tiny_run(tiny_dataset, tiny_clip, tmp_path_factory):
    """A finished LoRA run: its folder, its parsed options and its arguments. Read only: tests that write copy the folder."""
    output_dir = tmp_path_factory.mktemp("runs")
    arguments = tiny_arguments(tiny_dataset, tiny_clip, output_dir)
    folder = trained(tiny_dataset, tiny_clip, output_dir)
    return SimpleNamespace(folder=folder, options=parsed(arguments), arguments=arguments)


@pytest.fixture(scope="session")
def tiny_global_run(tiny_dataset, tiny_clip, tmp_path_factory):
    """The folder of a finished run of a method without groups. Read only."""
    output_dir = tmp_path_factory.mktemp("global_runs")
    return trained(tiny_dataset, tiny_clip, output_dir, method="global", global_epochs=1, num_epochs=1)


def make_trainer(model, fetch, lr=1e-2, wdecay=0.0, l2_emb=0.0):
    """A trainer alone on the CPU; `fetch(items)` returns the encoder's inputs."""
    source = SimpleNamespace(fetch=lambda items, device: fetch(items))
    return Trainer(model, source, Accelerator(cpu=True), lr=lr, wdecay=wdecay, l2_emb=l2_emb)


@pytest.fixture
def copied_run(tiny_run, tmp_path):
    """The finished run copied to a folder of the test's own, and the arguments that name it."""
    folder = shutil.copytree(tiny_run.folder, tmp_path / "runs" / tiny_run.folder.name)
    arguments = [*tiny_run.arguments, "--output_dir", str(folder.parent)]  # the last of two wins
    return SimpleNamespace(folder=folder, arguments=arguments)
