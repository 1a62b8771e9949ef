"""The demo data set: its files, that it comes out the same every time, and that its groups choose by what they are said to."""
import csv
import itertools
from collections import Counter

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
    return folder


@pytest.fixture(scope="module")
def drawn():
    """Histories at the demo's real size: items, histories, groups."""
    rng = np.random.default_rng(5)
    items = draw_items(400, rng)
    return items, *choose_histories(items, 1200, rng)


def test_files_are_those_of_any_data_set(folder):
    dataset = read_dataset(folder, "demo")
    assert (dataset.num_users, dataset.num_items, dataset.missing_titles) == (NUM_USERS, NUM_ITEMS, 0)
    assert all(Image.open(path).size == (IMAGE_SIZE,) * 2 for path in dataset.image_paths)
    assert set(dataset.histories.items) == set(range(1, NUM_ITEMS + 1))
    for user in range(NUM_USERS):
        history = dataset.histories[user].tolist()
        assert len(set(history)) == len(history) >= demo.SHORTEST
    assert not [path for path in folder.iterdir() if path.suffix in (".tmp", ".old")]


def test_items_nobody_would_choose_occur_all_the_same():
    rng = np.random.default_rng(0)
    histories, groups = choose_histories(draw_items(300, rng), 8, rng)
    assert {item for history in histories for item in history} == set(range(1, 301))
    assert sorted(groups) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_true_groups_and_attributes_name_every_user_and_item(folder):
    users = rows_of(folder / "demo_true_groups.csv")
    assert [int(row["user"]) for row in users] == list(range(1, NUM_USERS + 1))
    assert Counter(int(row["group"]) for row in users) == dict.fromkeys(range(len(GROUPS)), NUM_USERS // len(GROUPS))
    items = rows_of(folder / "demo_attributes.csv")
    assert [row["raw_id"] for row in items] == read_dataset(folder, "demo").raw_ids
    assert list(items[0]) == ["item", "raw_id", *Item._fields]


def test_same_seed_same_files_other_seed_others_and_global_random_numbers_go_on(tmp_path):
    before = np.random.get_state()[1].tolist()
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        make_demo(tmp_path / name, 12, 8, seed=seed)
    one, two, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("[!.]*.*")} for name in ("one", "two", "other")
    )
    assert one == two and len(one) == 8 + 5
    assert not [name for name in ("D0001.jpg", "demo_final.txt") if one[name] == other[name]]
    assert np.random.get_state()[1].tolist() == before


def test_what_is_there_is_kept(tmp_path):
    make_demo(tmp_path, 8, 4)
    before = (tmp_path / "demo_final.txt").read_text()
    make_demo(tmp_path, 40, 20, seed=9)
    assert (tmp_path / "demo_final.txt").read_text() == before


def test_interrupted_making_is_started_again(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_pickle", full_disk)
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
    items, histories, groups = drawn
    for group, (own, _) in enumerate(GROUPS):
        mine = [history for history, other in zip(histories, groups) if other == group]
        # the share of a user's interactions that show the user's two commonest values of an aspect, beside that of any 9 items
        shares = {}
        for aspect in ("shape", "colour", "brand", "material"):
            values = [[getattr(items[item - 1], aspect) for item in history] for history in mine]
            shares[aspect] = np.mean([sum(count for _, count in Counter(v).most_common(2)) / len(v) for v in values])
        others = max(share for aspect, share in shares.items() if aspect != own)
        assert shares[own] > demo.LIKED_SHARE
        assert shares[own] > others + 0.2


def test_groups_lean_to_their_categories_and_have_items_elsewhere_too(drawn):
    items, histories, groups = drawn
    for group, (_, home) in enumerate(GROUPS):
        chosen = [items[item - 1].category for history, other in zip(histories, groups) if other == group for item in history]
        assert demo.HOME_SHARE < np.mean([category in home for category in chosen]) < demo.HOME_SHARE + 0.12
        assert set(chosen) == set(demo.CATEGORIES)
    pairs = {(item, group) for history, group in zip(histories, groups) for item in history}
    groups_of = Counter(item for item, _ in pairs)
    assert np.mean([groups_of[item] >= 3 for item in range(1, len(items) + 1)]) > 0.8


def test_groups_can_be_found_from_histories(drawn):
    items, histories, groups = drawn
    at_home = {category: group for group, (_, home) in enumerate(GROUPS) for category in home}
    shares = np.zeros((len(histories), len(GROUPS)))  # [users, departments]
    for user, history in enumerate(histories):
        for item in history[:-1]:  # as in training: without the test item
            shares[user, at_home[items[item - 1].category]] += 1 / (len(history) - 1)
    assert adjusted_rand_score(groups, KMeans(len(GROUPS), n_init=10, random_state=0).fit_predict(shares)) > 0.7


def test_two_images_of_the_same_aspects_differ_a_little():
    rng = np.random.default_rng(0)
    item = Item("mug", "round", "blue", "dotted", "Kumo", "metal")
    first, second = (np.asarray(draw_image(item, rng)).astype(float) for _ in range(2))  # [height, width, RGB]
    red = np.asarray(draw_image(item._replace(colour="red"), rng)).astype(float)
    middle = np.s_[30:65, 30:60]  # the body's face
    assert (first != second).mean() > 0.5
    for blue in (first, second):
        assert blue[middle][..., 2].mean() > blue[middle][..., 0].mean() + 20
    assert red[middle][..., 0].mean() > red[middle][..., 2].mean() + 20


@pytest.mark.parametrize("aspect", Item._fields)
def test_every_value_of_every_aspect_can_be_drawn_and_shows(aspect):
    plain = Item("mug", "round", "blue", "plain", "Kumo", "metal")
    values = getattr(demo, {"category": "CATEGORIES"}.get(aspect, f"{aspect.upper()}S"))
    items = [plain._replace(**{aspect: value}) for value in values]
    images = [np.asarray(draw_image(item, np.random.default_rng(2))).astype(int) for item in items]
    for image, other in itertools.combinations(images, 2):  # of the same chance, so what differs is the aspect
        assert (abs(image - other).max(2) > 30).mean() > 0.003


def test_caption_pairs_are_seeded_and_speak_of_what_titles_hide():
    images, captions = demo_pairs(32, seed=1, num=60)
    again, same_captions = demo_pairs(32, seed=1, num=60)
    assert (images.shape, images.dtype) == ((60, 3, 32, 32), torch.uint8)
    assert torch.equal(images, again)
    assert captions == same_captions != demo_pairs(32, seed=2, num=60)[1]
    spoken = set().union(*map(words_of, captions))
    assert len(spoken & set(demo.COLOURS)) > 4
    assert len(spoken & set(demo.PATTERNS)) > 2


def test_captions_know_every_word_of_the_titles():
    rng = np.random.default_rng(0)
    titles = set().union(*(words_of(shop_title(item, rng)) for item in draw_items(400, rng)))
    assert titles <= set().union(*(words_of(demo.web_caption(item, rng)) for item in draw_items(2000, rng)))
