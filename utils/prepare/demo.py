"""The demo data set: drawn shop items, and users in groups that each choose by another aspect of the same items."""
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.common.files import build_once, folder_written_atomically, write_pickle, write_text_atomically
from utils.prepare.demo_drawing import COLOURS, MATERIALS, Item, draw_image

# --- The items: every item has one value of each aspect, drawn independently, so that no aspect predicts another.
CATEGORIES = ("bag", "clock", "cushion", "kite", "lamp", "mirror", "mug", "planter")  # shown by handles, hands, leaves, ...
SHAPES = ("round", "square", "triangular", "hexagonal", "star", "heart")  # the outline of the body
PATTERNS = ("plain", "striped", "dotted", "checked", "zigzag")  # the print on the body
BRANDS = ("Norvik", "Halden", "Solis", "Kumo", "Tarro", "Velia", "Lumo", "Brisk")  # a word in titles, a mark in images
STYLES = ("classic", "everyday", "compact", "deluxe", "handmade", "modern", "gift", "studio")  # words that mean nothing here

# --- The users: what each group chooses by, and the categories it mostly shops in. Two aspects are seen only in images
# (colour, shape) and two are also read in titles (brand, material), so that both towers of CLIP matter.
GROUPS = (
    ("colour", ("cushion", "kite")),
    ("brand", ("bag", "mug")),
    ("shape", ("clock", "mirror")),
    ("material", ("lamp", "planter")),
)
LIKED_SHARE = 0.8  # of a user's interactions show a value the user likes; the rest is chance, as in any shop
# This share of them is in the group's own categories, which makes the groups recoverable from histories (with 0.55 k-means
# finds them badly); the rest is anywhere, so that every item occurs in several groups, for different reasons.
HOME_SHARE = 0.7
TWO_LIKES_SHARE = 0.5  # of the users like two values of their aspect, the others one
SHORTEST, LONGEST = 5, 14  # interactions of a user: the least a 5-core data set has, and a little beyond the usual maxlen 10
POPULARITY_SPREAD = 0.6  # standard deviation of log popularity: some items sell several times better than others


def draw_items(num: int, rng: np.random.Generator) -> list[Item]:
    """Draw the aspects of `num` items, each value as likely as any other of its aspect."""
    kinds = (CATEGORIES, SHAPES, tuple(COLOURS), PATTERNS, BRANDS, tuple(MATERIALS))  # in the order of Item
    columns = [[kind[value] for value in rng.integers(len(kind), size=num)] for kind in kinds]
    return [Item(*values) for values in zip(*columns)]


def shop_title(item: Item, rng: np.random.Generator) -> str:
    """Write a title as a shop would: category, brand, material, sometimes a style; never colour, pattern or shape."""
    style = f"{_pick(STYLES, rng)} " if rng.random() < 0.5 else ""
    forms = (
        f"{item.brand} {style}{item.material} {item.category}",
        f"{style}{item.material} {item.category} by {item.brand}",
        f"{item.brand} {style}{item.category}, {item.material}",
    )
    title = _pick(forms, rng)
    return title[0].upper() + title[1:]


def web_caption(item: Item, rng: np.random.Generator) -> str:
    """Write a caption as found on the web: some of the aspects (colour and pattern among them), in no fixed order."""
    if rng.random() < 0.15:  # some web pages are shops
        return shop_title(item, rng)
    words = [word for word in (item.colour, item.pattern, item.shape, item.material) if rng.random() < 0.8]
    rng.shuffle(words)
    if rng.random() < 0.25:
        words.insert(0, _pick(STYLES, rng))
    phrase = " ".join([*words, item.category])
    listed = f"{item.category} from {item.brand}, {', '.join(words) or item.material}"
    return _pick((phrase, f"{item.brand} {phrase}", f"a {phrase} by {item.brand}", listed), rng)


def _pick(values: tuple[str, ...], rng: np.random.Generator) -> str:
    return values[rng.integers(len(values))]


def choose_histories(items: list[Item], num_users: int, rng: np.random.Generator) -> tuple[list[list[int]], list[int]]:
    """Draw histories: mostly items with a value that the user likes of the group's aspect, mostly in the group's categories.

    Returns:
        The histories (of each user, item numbers from 1 in time order, none twice; together every item occurs) and
        the group of each user, 0 to len(GROUPS) - 1; groups are as equal in size as can be.
    """
    groups = rng.permutation(np.arange(num_users) % len(GROUPS)).tolist()
    popularity = np.exp(rng.normal(0, POPULARITY_SPREAD, size=len(items)))  # [items]
    by_aspect = {aspect: np.array([getattr(item, aspect) for item in items]) for aspect in Item._fields}  # words [items]
    likings = [_liked_items(by_aspect[GROUPS[group][0]], rng) for group in groups]  # of each user, bool [items]
    homes = [np.isin(by_aspect["category"], categories) for _, categories in GROUPS]  # of each group, bool [items]

    histories = []
    for liked, group in zip(likings, groups):
        free = np.ones(len(items), dtype=bool)  # not yet in the history
        history = []
        for _ in range(min(int(rng.integers(SHORTEST, LONGEST + 1)), len(items))):
            preferred = liked if rng.random() < LIKED_SHARE else free
            where = homes[group] if rng.random() < HOME_SHARE else free
            candidates = next(c for c in (free & preferred & where, free & preferred, free) if c.any())
            weights = popularity * candidates
            item = int(rng.choice(len(items), p=weights / weights.sum()))
            free[item] = False
            history.append(item + 1)
        histories.append(history)

    for item in sorted(set(range(1, len(items) + 1)) - {item for history in histories for item in history}):
        fans = [user for user, liked in enumerate(likings) if liked[item - 1]] or range(num_users)
        shortest = min(fans, key=lambda user: len(histories[user]))
        histories[shortest].insert(int(rng.integers(len(histories[shortest]) + 1)), item)
    return histories, groups


def _liked_items(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the one or two values a user likes among the aspect's `values` [items]; True [items] where an item has one."""
    there = np.unique(values)
    number = min(2 if rng.random() < TWO_LIKES_SHARE else 1, len(there))
    return np.isin(values, rng.choice(there, size=number, replace=False))


def make_demo(train_dir: str | Path, num_users: int = 1200, num_items: int = 400, seed: int = 0) -> None:
    """Write the demo data set into a folder, unless it is there already; the same seed makes the same files.

    The files are the ones of any data set, and two that only drawn data can have: `demo_true_groups.csv` (user, group) and
    `demo_attributes.csv` (item, raw_id and its aspects). Each is written in full and then moved into place, `demo_final.txt`
    last: where it exists, the data set is complete.
    """
    train_dir = Path(train_dir)
    with build_once(train_dir / "demo_final.txt") as missing:
        if not missing:
            return
        rng = np.random.default_rng([seed, 0])
        items = draw_items(num_items, rng)
        raw_ids = [f"D{number:04d}" for number in range(1, num_items + 1)]
        titles = {raw_id: shop_title(item, rng) for raw_id, item in zip(raw_ids, items)}
        histories, groups = choose_histories(items, num_users, rng)

        with folder_written_atomically(train_dir / "demo_images") as folder:
            for raw_id, item in zip(tqdm(raw_ids, "Drawing the demo's items", unit="item", leave=False, disable=None), items):
                draw_image(item, rng).save(folder / f"{raw_id}.jpg", quality=92)
        aspects = [f"{number},{raw_id},{','.join(item)}" for number, (raw_id, item) in enumerate(zip(raw_ids, items), start=1)]
        _write_lines(train_dir / "demo_attributes.csv", [f"item,raw_id,{','.join(Item._fields)}", *aspects])
        of_groups = [f"{user},{group}" for user, group in enumerate(groups, start=1)]
        _write_lines(train_dir / "demo_true_groups.csv", ["user,group", *of_groups])
        write_pickle(train_dir / "demo_item2id_final.pickle", dict(enumerate(raw_ids, start=1)))
        write_pickle(train_dir / "demo_texts_final.pickle", titles)
        interactions = [f"{user} {item}" for user, history in enumerate(histories, start=1) for item in history]
        _write_lines(train_dir / "demo_final.txt", interactions)


def _write_lines(path: Path, lines: list[str]) -> None:
    write_text_atomically(path, "\n".join(lines) + "\n")
