"""The small CLIP: its tokenizer, its loss, that it learns, and that what it leaves is an ordinary CLIPModel folder."""
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPTokenizerFast

from scripts import make_small_clip
from tests.conftest import exit_code
from utils.common.errors import PerPEFTError
from utils.prepare import demo_clip, small_clip
from utils.prepare.small_clip import Sizes, contrastive_loss, read_images, retrieval, train_small_clip
from utils.prepare.small_tokenizer import train_tokenizer

SIZES = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "heads": 2}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240), "black": (10, 10, 10)}


def coloured_pairs(num, seed=0):
    """Noisy images of one colour each, and titles that name it; many titles are the same."""
    rng = np.random.default_rng(seed)
    names = [list(COLOURS)[row] for row in rng.integers(len(COLOURS), size=num)]
    plain = np.array([COLOURS[name] for name in names])[:, :, None, None]  # [num, RGB, 1, 1]
    images = np.clip(plain + rng.normal(0, 20, size=(num, 3, 32, 32)), 0, 255).astype(np.uint8)
    titles = [f"{name} {['mug', 'a much longer lamp, no. 7'][row]}" for name, row in zip(names, rng.integers(2, size=num))]
    return torch.from_numpy(images), titles


def trained(folder, steps=40, seed=0, **options):
    return train_small_clip(*coloured_pairs(200), folder, Sizes(**SIZES), steps=steps, batch_size=32, seed=seed, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small CLIP's folder, what training returned, and the folder's parts as transformers alone opens them."""
    folder = tmp_path_factory.mktemp("clip") / "small"
    result, parts = trained(folder), {"model": CLIPModel, "processor": CLIPImageProcessor, "tokenizer": AutoTokenizer}
    return SimpleNamespace(folder=folder, result=result, **{name: part.from_pretrained(folder) for name, part in parts.items()})


def test_frequent_words_are_one_token_and_no_text_is_unknown():
    tokenizer = train_tokenizer(["Red lamp", "red mug"] * 5, vocab_size=600)
    assert tokenizer.tokenize("RED lamp") == ["red</w>", "lamp</w>"]
    for text in ("zebra", "ελληνικά", "漢字 🙂", "50% off!", "x"):
        ids = tokenizer(text)["input_ids"]
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in ids[:-1]  # EOS is also the unknown token: inside, it would end the title
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")


def test_tokenizer_is_the_same_every_time_and_keeps_its_sizes():
    titles = ["".join(letters) for letters in itertools.product("abcdefgh", "ijklmnop", "qrstuvwx")]
    tokenizers = [train_tokenizer(titles, vocab_size=550, max_tokens=8) for _ in range(4)]
    assert len({tokenizer.backend_tokenizer.to_str() for tokenizer in tokenizers}) == 1
    tokenizer, (bos, eos) = tokenizers[0], (548, 549)
    assert (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id) == (550, bos, eos)
    ids = tokenizer("red lamp " * 20, truncation=True)["input_ids"]
    assert (len(ids), ids[-1], tokenizer("", truncation=True)["input_ids"]) == (8, eos, [bos, eos])


def test_loss_is_clips_but_that_same_titles_are_no_false_negatives():
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers = torch.arange(6)
    expected = (F.cross_entropy(logits, numbers) + F.cross_entropy(logits.T, numbers)) / 2
    torch.testing.assert_close(contrastive_loss(logits.float(), numbers), expected.float())
    # Pairs 0 and 1 share a title, so all four of their logits are high: nothing is wrong, and the loss is the least there can be.
    logits = torch.tensor([[9.0, 9, -9], [9, 9, -9], [-9, -9, 9]])
    least = np.log(2) * 2 / 3  # two rows must share their probability between two matches
    assert contrastive_loss(logits, torch.tensor([4, 4, 1])).item() == pytest.approx(least, abs=1e-5)
    pulled_apart = torch.tensor([[9.0, -9, -9], [-9, 9, -9], [-9, -9, 9]])
    assert contrastive_loss(pulled_apart, torch.tensor([4, 4, 1])) > least + 1


def test_retrieval_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.4], [0.7, 0.6, 0.5]])  # every image likes title 0 best
    for numbers, image_to_title, chance in (([0, 1, 2], 1 / 3, 1 / 3), ([0, 0, 2], 2 / 3, 5 / 9)):
        expected = {"image_to_title": image_to_title, "title_to_image": 2 / 3, "chance": chance}
        assert retrieval(similarity, torch.tensor(numbers)) == pytest.approx(expected)


def test_training_lowers_the_loss_and_finds_unseen_pairs(made):
    result = made.result
    assert result["held_out"] == 20
    assert result["last_loss"] < 0.75 * result["first_loss"]
    assert min(result["image_to_title"], result["title_to_image"]) > 2 * result["chance"]


def test_drawn_items_are_learnt_above_chance(tmp_path):
    result = train_small_clip(*demo_clip.demo_pairs(num=500), tmp_path / "clip", steps=60, batch_size=64, vary=False)
    assert result["last_loss"] < result["first_loss"] - 0.2
    assert (result["title_to_image"] + result["image_to_title"]) / 2 > 2 * result["chance"]


def test_retrieval_near_chance_is_warned_of(tmp_path, monkeypatch, capsys):
    for share, warned in ((0.1, True), (0.3, False)):
        found = {"image_to_title": share, "title_to_image": 0.05, "chance": 0.05}
        monkeypatch.setattr(small_clip, "retrieval", lambda *_, found=found: found)
        trained(tmp_path / "clip", steps=1)
        assert ("learned nothing from these images: use a pretrained one" in capsys.readouterr().err) == warned


def test_same_seed_same_weights_and_the_callers_random_numbers_go_on(tmp_path):
    before = torch.get_rng_state()
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        trained(tmp_path / name, steps=3, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    one, two, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other


def test_folder_opens_with_transformers_alone(made):
    model, processor = made.model, made.processor
    assert (model.num_parameters(), model.config.projection_dim) == (made.result["parameters"], small_clip.PROJECTION_DIM)
    assert (processor.size, processor.crop_size) == ({"shortest_edge": 32}, {"height": 32, "width": 32})
    assert processor.image_mean == CLIPImageProcessor().image_mean
    texts = ["red mug", "Blue lamp, no. 7", "unheard-of thing"]
    for kind in (CLIPTokenizer, CLIPTokenizerFast):
        assert kind.from_pretrained(made.folder)(texts)["input_ids"] == made.tokenizer(texts)["input_ids"]
    assert made.tokenizer.model_max_length == model.config.text_config.max_position_embeddings
    both, image = CLIPProcessor.from_pretrained(made.folder), Image.new("RGB", (50, 40))
    inputs = both(text=texts, images=image, padding=True, return_tensors="pt")
    assert model(**inputs).logits_per_image.shape == (1, 3)


def test_pooled_token_is_eos_whatever_the_padding(made):
    model, tokenizer = made.model, made.tokenizer
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config.text_config, name) == getattr(tokenizer, name) != 2  # which pools the largest id
    texts = ["red mug", "a much longer lamp of blue"]
    batch = tokenizer(texts, padding="max_length", max_length=20, return_tensors="pt")
    ends = batch["attention_mask"].sum(1) - 1  # [texts]: where EOS stands
    assert (batch["input_ids"][torch.arange(2), ends] == tokenizer.eos_token_id).all()
    with torch.no_grad():
        output = model.text_model(input_ids=batch["input_ids"])
        alone = model.text_model(**tokenizer(texts[:1], return_tensors="pt")).pooler_output
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state[torch.arange(2), ends])
    torch.testing.assert_close(output.pooler_output[:1], alone)


@torch.no_grad()
def test_training_sees_what_the_saved_processor_makes(made):
    images, _ = coloured_pairs(4, seed=5)
    tokens = made.tokenizer(["red mug", "blue mug"], return_tensors="pt")["input_ids"]
    found = small_clip._similarity(made.model, images, tokens)
    inputs = made.processor([Image.fromarray(image.transpose(1, 2, 0)) for image in images.numpy()], return_tensors="pt")
    expected = made.model(input_ids=tokens, **inputs).logits_per_image / made.model.logit_scale.exp()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_varied_images_keep_their_size_and_content():
    images, _ = coloured_pairs(16)
    varied = small_clip._varied(images, torch.Generator().manual_seed(0))
    assert varied.shape == images.shape and not torch.equal(varied, images.float())
    torch.testing.assert_close(varied.mean((2, 3)), images.float().mean((2, 3)), atol=6, rtol=0)


def test_sizes_that_make_no_clip_are_refused(tmp_path):
    for change in ({"patch_size": 15}, {"heads": 3}):
        with pytest.raises(PerPEFTError, match="no multiple"):
            Sizes(**SIZES | change)
    with pytest.raises(PerPEFTError, match="too few"):
        train_small_clip(*coloured_pairs(19), tmp_path / "clip", Sizes(**SIZES), steps=1)
    assert not list(tmp_path.iterdir())


def test_images_are_read_as_the_processor_does_and_unreadable_ones_named(tiny_dataset, tmp_path):
    paths = sorted((tiny_dataset.train_dir / "tiny_images").iterdir())
    processor = small_clip.image_processor(32)
    expected = processor([Image.open(path) for path in paths], do_rescale=False, do_normalize=False, return_tensors="pt")
    assert torch.equal(read_images(paths, 32), expected["pixel_values"].to(torch.uint8))
    (tmp_path / "B7.jpg").write_bytes(b"no image")
    with pytest.raises(PerPEFTError, match=r"(?s)B7\.jpg \(item 2.*gone\.jpg \(item 3"):
        read_images([paths[0], tmp_path / "B7.jpg", tmp_path / "gone.jpg"], 32)


def test_demo_clip_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_clip, "demo_pairs", lambda: coloured_pairs(25))
    monkeypatch.setattr(demo_clip, "train_small_clip", lambda images, titles, folder, vary: folder.mkdir(parents=True))
    for _ in range(2):  # the folder cannot be made twice
        assert demo_clip.demo_clip(tmp_path / "cache") == tmp_path / "cache" / "demo_small_clip"
    assert (tmp_path / "cache" / "demo_small_clip").is_dir()


def test_script_trains_on_any_data_set(tiny_dataset, tmp_path, capsys):
    folder = tmp_path / "own" / "clip"
    sizes = [part for name, value in SIZES.items() for part in (f"--{name}", value)]
    options = [*sizes, "--dataset", "tiny", "--train_dir", tiny_dataset.train_dir, "--output", folder, "--steps", 2]
    assert exit_code(options, make_small_clip.main) == 0
    assert CLIPModel.from_pretrained(folder).config.vision_config.image_size == 32
    result, hint = capsys.readouterr().out.splitlines()
    assert "among 3 unseen pairs" in result and f"--clip_model {folder}" in hint
    before = (folder / "model.safetensors").read_bytes()
    assert exit_code(options, make_small_clip.main) == 2 and "is there already" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == before
