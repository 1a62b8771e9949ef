"""One HTML page about items and users of a data set: no script, nothing from elsewhere, every image in it once."""
import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from utils.analysis.attention import Explanation
from utils.analysis.recommendation import Person, Ranking, label_of
from utils.common.files import write_text_atomically
from utils.data.dataset import Dataset
from utils.data.images import decoded_image

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
DARKEST = 0.2  # brightness of a patch without attention

Tile = tuple[int, str, bool]  # an item in a list, a note below its title, and whether it is marked as the test item


@dataclass
class ItemCard:
    """An item: its image as a data URI, where it appears on the page, its number of interactions, and attention to it by run."""

    item: int
    image: str
    mentions: dict[str, str] = field(default_factory=dict)  # label by anchor
    counts: str = ""
    seen: str = ""  # the part that CLIP sees, as a data URI
    attention: list[tuple[str, Explanation]] = field(default_factory=list)


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def thumbnail(path: Path, edge: int = 112, crop: float | None = None) -> str:
    """An image as JPEG in a data URI, its longer edge `edge` pixels; a grey square where it cannot be read.

    With `crop`, it is only a central square, this share of the shorter edge wide.
    """
    try:
        with decoded_image(path, edge) as image:
            if crop:
                side = round(crop * min(image.size))
                left, top = ((length - side) // 2 for length in image.size)
                image = image.crop((left, top, left + side, top + side))
            image.thumbnail((edge, edge))
            return _data_uri(image, "JPEG", quality=80, optimize=True)
    except (OSError, ValueError):
        return _data_uri(Image.new("RGB", (8, 8), "lightgray"), "JPEG")


def shadow(patches: np.ndarray, brightest: float) -> str:
    """An overlay that darkens an image where there is little attention, a pixel a patch, as PNG in a data URI.

    `patches` are shares of attention, [rows, columns]; the share `brightest` is not darkened.
    """
    darkness = Image.fromarray(np.uint8(255 * (1 - DARKEST) * (1 - np.clip(patches / brightest, 0, 1))))
    return _data_uri(Image.merge("LA", (Image.new("L", darkness.size), darkness)), "PNG", optimize=True)


TEMPLATES.globals.update(zip=zip, shadow=shadow)


class Page:
    """What a page shows; every item in any list gets one card, to which all lists link."""

    def __init__(self, dataset: Dataset, heading: str):
        self.dataset, self.heading = dataset, heading
        self.items: dict[int, ItemCard] = {}
        self.users: list[dict[str, Any]] = []  # the variables of their cards

    def card(self, item: int) -> ItemCard:
        """The card of an item, made when first asked for."""
        if item not in self.items:
            self.items[item] = ItemCard(item, thumbnail(self.dataset.image_paths[item - 1]))
        return self.items[item]

    def tile(self, item: int, anchor: str, label: str, note: str = "", marked: bool = False) -> Tile:
        """An item in the list of the card `anchor`, which `label` names where the item's card links back."""
        self.card(item).mentions.setdefault(anchor, label)
        return item, note, marked

    def add_user(
        self, person: Person, rankings: Sequence[tuple[str, Ranking]], top_k: int, kind: str = "", gain: str = ""
    ) -> None:
        """Add a user's card: the last `top_k` items of the history, and what each adapter recommends.

        Args:
            rankings: each with the name of its run, or "".
            kind, gain: why the user is shown, and their gain in NDCG@20.
        """
        name, anchor = person.name, person.name.replace(" ", "-")
        shown = person.history[-top_k:].tolist()
        few = f"last {len(shown)} of {len(person.history)}" if len(shown) < len(person.history) else f"{len(shown)} items"
        rows = [("History", f"{few}, latest last", [self.tile(item, anchor, name) for item in shown])]
        for run_name, ranking in rankings:
            label = f"{run_name}: {label_of(ranking)}" if run_name else label_of(ranking).capitalize()
            test_rank = ranking["rank_of_test_item"]
            note = "" if test_rank is None else f"test item at rank {test_rank:,}"
            best = [(each["item"], f"{each['score']:.2f}") for each in ranking["items"]]
            rows.append((label, note, [self.tile(item, anchor, name, score, item == person.test_item) for item, score in best]))
        self.users.append({"person": person, "anchor": anchor, "kind": kind, "gain": gain, "rows": rows})

    def add_attention(self, explanation: Explanation, run_name: str = "") -> None:
        """Add the attention to an item in one run to the item's card."""
        card = self.card(explanation.item)
        card.seen = card.seen or thumbnail(self.dataset.image_paths[explanation.item - 1], 144, explanation.crop)
        card.attention.append((run_name, explanation))

    def write(self, path: Path, **sections: Any) -> None:
        """Write the page; `sections` are further variables of the template."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, TEMPLATES.get_template("report.html.j2").render(page=self, **sections).lstrip())
