"""The demo data set: its files, that it comes out the same every time, and that its groups choose by what they are said to."""
import csv
import itertools
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.prepare import demo
from utils.prepare.demo import GROUPS, Item, choose_histories, draw_image, draw_items, make_demo, shop_title
from utils.prepare.demo_clip import demo_pairs
from utils.prepare.demo_drawing import IMAGE_SIZE

NUM_USERS, NUM_ITEMS = 200, 60


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def words_of(text):
    return set(text.lower().replace(",", " ").split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "dataset"
    make_demo(folder, NUM_USERS, NUM_ITEMS)
    make_demo(folder, 40, 20, seed=9)  # what is there is kept
    return folder


@pytest.fixture(scope="module")
def drawn():
    """Of each group at the demo's real size, its users' histories, as lists of items."""
    rng = np.random.default_rng(5)
    items = draw_items(400, rng)
    histories, groups = choose_histories(items, 1200, rng)
    chosen = [[items[item - 1] for item in history] for history in histories]
    return [[history for history, other in zip(chosen, groups) if other == group] for group in range(len(GROUPS))]


def test_files_are_those_of_any_data_set_and_true_groups_and_attributes(folder):
    dataset = read_dataset(folder, "demo")
    assert (dataset.num_users, dataset.num_items, dataset.missing_titles) == (NUM_USERS, NUM_ITEMS, 0)
    assert all(Image.open(path).size == (IMAGE_SIZE,) * 2 for path in dataset.image_paths)
    assert set(dataset.histories.items) == set(range(1, NUM_ITEMS + 1))
    for user in range(NUM_USERS):
        history = dataset.histories[user].tolist()
        assert len(set(history)) == len(history) >= demo.SHORTEST
    assert not [path for path in folder.iterdir() if path.suffix in (".tmp", ".old")]
    users = rows_of(folder / "demo_true_groups.csv")
    assert [int(row["user"]) for row in users] == list(range(1, NUM_USERS + 1))
    assert Counter(int(row["group"]) for row in users) == dict.fromkeys(range(len(GROUPS)), NUM_USERS // len(GROUPS))
    items = rows_of(folder / "demo_attributes.csv")
    assert [row["raw_id"] for row in items] == dataset.raw_ids
    assert list(items[0]) == ["item", "raw_id", *Item._fields]


def test_items_nobody_would_choose_occur_all_the_same():
    rng = np.random.default_rng(0)
    histories, groups = choose_histories(draw_items(300, rng), 8, rng)
    assert {item for history in histories for item in history} == set(range(1, 301))
    assert sorted(groups) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_same_seed_same_files_other_seed_others_and_global_random_numbers_go_on(tmp_path):
    def files(name, seed):
        make_demo(tmp_path / name, 12, 8, seed=seed)
        return {path.name: path.read_bytes() for path in (tmp_path / name).rglob("[!.]*.*")}

    before = np.random.get_state()[1].tolist()
    one, two, other = files("one", 3), files("two", 3), files("other", 4)
    assert one == two and len(one) == 8 + 5
    assert not [name for name in ("D0001.jpg", "demo_final.txt") if one[name] == other[name]]
    assert np.random.get_state()[1].tolist() == before


def test_interrupted_making_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "write_pickle", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        make_demo(tmp_path, 8, 4)
    with pytest.raises(PerPEFTError):
        read_dataset(tmp_path, "demo")
    monkeypatch.undo()
    make_demo(tmp_path, 8, 4)
    assert read_dataset(tmp_path, "demo").num_items == 4


def test_titles_name_brand_material_category_and_nothing_that_only_the_image_shows(folder):
    hidden = {*demo.COLOURS, *demo.PATTERNS, *demo.SHAPES}
    for title, item in zip(read_dataset(folder, "demo").titles, rows_of(folder / "demo_attributes.csv")):
        assert {item["brand"].lower(), item["material"], item["category"]} <= words_of(title)
        assert not words_of(title) & hidden


def test_each_group_chooses_by_its_own_aspect(drawn):
    def share(aspect, history):
        """Of items that show the two values of the aspect which are commonest in a history."""
        return sum(count for _, count in Counter(getattr(item, aspect) for item in history).most_common(2)) / len(history)

    aspects = [aspect for aspect, _ in GROUPS]
    for own, histories in zip(aspects, drawn):
        shares = {aspect: np.mean([share(aspect, history) for history in histories]) for aspect in aspects}
        assert shares.pop(own) > max(demo.LIKED_SHARE, max(shares.values()) + 0.2)


def test_groups_lean_to_their_categories_and_have_items_elsewhere_too(drawn):
    for (_, home), histories in zip(GROUPS, drawn):
        chosen = [item.category for history in histories for item in history]
        assert demo.HOME_SHARE < np.mean([category in home for category in chosen]) < demo.HOME_SHARE + 0.12
        assert set(chosen) == set(demo.CATEGORIES)
    groups_of = Counter(item for histories in drawn for item in set(itertools.chain(*histories)))
    assert np.mean([count >= 3 for count in groups_of.values()]) > 0.8


def test_groups_can_be_found_from_histories(drawn):
    groups = [group for group, histories in enumerate(drawn) for _ in histories]
    training = [history[:-1] for histories in drawn for history in histories]
    shares = [[np.mean([item.category in home for item in history]) for _, home in GROUPS] for history in training]
    assert adjusted_rand_score(groups, KMeans(len(GROUPS), n_init=10, random_state=0).fit_predict(shares)) > 0.7


def test_two_images_of_the_same_aspects_differ_a_little():
    rng = np.random.default_rng(0)
    items = [Item("mug", "round", colour, "dotted", "Kumo", "metal") for colour in ("blue", "blue", "red")]
    faces = [np.asarray(draw_image(item, rng)).astype(float)[30:65, 30:60] for item in items]  # [height, width, RGB] of bodies
    assert (faces[0] != faces[1]).mean() > 0.5
    bluer = [face[..., 2].mean() - face[..., 0].mean() for face in faces]
    assert min(bluer[:2]) > 20 and bluer[2] < -20


@pytest.mark.parametrize("aspect", Item._fields)
def test_every_value_of_every_aspect_can_be_drawn_and_shows(aspect):
    plain = Item("mug", "round", "blue", "plain", "Kumo", "metal")
    values = getattr(demo, {"category": "CATEGORIES"}.get(aspect, f"{aspect.upper()}S"))
    items = [plain._replace(**{aspect: value}) for value in values]
    images = [np.asarray(draw_image(item, np.random.default_rng(2))).astype(int) for item in items]
    for image, other in itertools.combinations(images, 2):  # of the same chance, so what differs is the aspect
        assert (abs(image - other).max(2) > 30).mean() > 0.003


def test_caption_pairs_are_seeded_and_speak_of_what_titles_hide_and_in_their_words():
    images, captions = demo_pairs(32, seed=1, num=60)
    again, same_captions = demo_pairs(32, seed=1, num=60)
    assert (images.shape, images.dtype) == ((60, 3, 32, 32), torch.uint8)
    assert torch.equal(images, again)
    assert captions == same_captions != demo_pairs(32, seed=2, num=60)[1]
    spoken = set().union(*map(words_of, captions))
    assert len(spoken & set(demo.COLOURS)) > 4
    assert len(spoken & set(demo.PATTERNS)) > 2
    rng = np.random.default_rng(0)
    titles = set().union(*(words_of(shop_title(item, rng)) for item in draw_items(400, rng)))
    assert titles <= set().union(*(words_of(demo.web_caption(item, rng)) for item in draw_items(2000, rng)))
