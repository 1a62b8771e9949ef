"""The demo's items and how their images are drawn: an image shows each aspect of its item in another place."""
import colorsys
import itertools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {  # hue of the body, as a share of the colour circle
    "red": 0.995, "orange": 0.075, "yellow": 0.15, "green": 0.36, "turquoise": 0.485, "blue": 0.61, "purple": 0.75, "pink": 0.9,
}  # fmt: skip
MATERIALS = {  # the tint of the rim around the body: hue, saturation, value; _material_texture adds grain, shine, ...
    "wooden": (0.075, 0.6, 0.62), "metal": (0.6, 0.08, 0.66), "glass": (0.52, 0.18, 0.95),
    "ceramic": (0.11, 0.06, 0.98), "woollen": (0.72, 0.12, 0.42), "wicker": (0.12, 0.42, 0.87),
}  # fmt: skip
IMAGE_SIZE = 96  # pixels a side: enough for the rim and the brand mark to be seen, and 400 of them are drawn in seconds
_POLYGONS = {  # corners, where the first one lies (a share of a full turn, from the right, clockwise), size beside the circle
    "round": (60, 0.0, 1.0), "square": (4, 0.125, 1.22), "triangular": (3, 0.75, 1.25), "hexagonal": (6, 0.0, 1.08),
    "star": (10, 0.75, 1.22),
}  # fmt: skip
_SCALE = 2  # drawn this many times larger and then shrunk, which smooths the edges
_CANVAS = IMAGE_SIZE * _SCALE


class Item(NamedTuple):
    """One item: one word for each aspect."""

    category: str
    shape: str
    colour: str
    pattern: str
    brand: str
    material: str


def draw_image(item: Item, rng: np.random.Generator) -> Image.Image:
    """Draw an item, RGB, IMAGE_SIZE x IMAGE_SIZE; place, size, tilt, tints, background and noise vary by `rng`."""
    centre = _CANVAS * np.array([0.47, 0.5]) + rng.uniform(-5, 5, size=2)
    radius = _CANVAS * rng.uniform(0.31, 0.34)
    outline = _outline(item.shape, tilt=rng.uniform(-0.12, 0.12))  # [points, 2]
    rim_width = rng.uniform(0.28, 0.32)
    body = [tuple(point) for point in centre + radius * outline]
    face = [tuple(point) for point in centre + radius * (1 - rim_width) * outline]

    image = _background(rng)
    pen = ImageDraw.Draw(image)
    foot = centre[1] + radius * 1.12
    pen.ellipse((centre[0] - radius * 0.8, foot - 6, centre[0] + radius * 0.8, foot + 8), fill=(196,) * 3)  # its shadow

    material = _material_texture(item.material, rng)
    _draw_fittings(pen, item.category, centre, radius, rng)
    image.paste(material, mask=_polygon_mask(body))
    image.paste(_print_texture(item.colour, item.pattern, rng), mask=_polygon_mask(face))
    pen.line([*body, body[0]], fill=(70,) * 3, width=3, joint="curve")
    pen.line([*face, face[0]], fill=(90,) * 3, width=2, joint="curve")
    _draw_front(pen, item.category, centre, radius)
    _draw_brand_mark(pen, item.brand, rng)

    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    noise = rng.normal(0, 4, size=(IMAGE_SIZE, IMAGE_SIZE, 3))  # [height, width, RGB]
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def _outline(shape: str, tilt: float) -> np.ndarray:
    """The corner points [points, 2] of a shape of about radius 1 around (0, 0), turned by `tilt` radians."""
    if shape == "heart":
        turn = np.linspace(0, 2 * math.pi, 60, endpoint=False)
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        points = np.stack([x, -y - 2], axis=1) / 15.5
    else:
        corners, first, size = _POLYGONS[shape]
        turn = 2 * math.pi * (np.arange(corners) / corners + first)
        points = size * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if shape == "star":
        points[1::2] *= 0.55  # every other corner lies inside
    if shape == "triangular":
        points[:, 1] += 0.22  # its middle is low
    rotation = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
    return points @ rotation.T


def _polygon_mask(points: list[tuple[float, float]]) -> Image.Image:
    mask = Image.new("L", (_CANVAS, _CANVAS))
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask


def _background(rng: np.random.Generator) -> Image.Image:
    """A pale studio wall, a little brighter at one end."""
    top, bottom = rng.uniform(222, 250, size=(2, 1)) + rng.uniform(-5, 5, size=(2, 3))  # [RGB] each
    share = np.linspace(0, 1, _CANVAS)[:, None]
    column = (top * (1 - share) + bottom * share).astype(np.uint8)  # [height, RGB]
    return Image.fromarray(np.repeat(column[:, None, :], _CANVAS, axis=1))


def _hsv(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    return tuple(round(part * 255) for part in colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value, 1)))


def _print_texture(colour: str, pattern: str, rng: np.random.Generator) -> Image.Image:
    """Fill a canvas with the colour, printed with the pattern in a paler or darker tone of it."""
    hue = COLOURS[colour] + rng.normal(0, 0.01)
    saturation, value = rng.uniform(0.72, 0.9), rng.uniform(0.82, 0.95)
    ground = _hsv(hue, saturation, value)
    tone = _hsv(hue, saturation * 0.25, 1.0) if rng.random() < 0.6 else _hsv(hue, saturation * 1.1, value * 0.5)
    layer = Image.new("RGB", (_CANVAS, _CANVAS), ground)
    pen = ImageDraw.Draw(layer)
    step = int(rng.integers(28, 33))  # pixels of the canvas from one stripe, dot, ... to the next
    shift = int(rng.integers(step))
    places = range(shift - 2 * step, _CANVAS + 2 * step, step)
    if pattern == "striped":
        lean = int(rng.choice([-70, 0, 70]))
        for x in places:
            pen.line((x - lean, 0, x + lean, _CANVAS), fill=tone, width=step // 2 - 2)
    elif pattern in ("dotted", "checked"):
        for (row, y), (column, x) in itertools.product(enumerate(places), repeat=2):
            if pattern == "dotted":  # every other row by half a step to the right
                left = x + step // 2 * (row % 2)
                pen.ellipse((left, y, left + step * 0.55, y + step * 0.55), fill=tone)
            elif (row + column) % 2:
                pen.rectangle((x, y, x + step - 1, y + step - 1), fill=tone)
    elif pattern == "zigzag":
        for y in places:
            turns = enumerate(range(0, _CANVAS + step, step // 2))
            pen.line([(x, y + step * (0.5 if turn % 2 else -0.25)) for turn, x in turns], fill=tone, width=7, joint="curve")
    return layer


def _material_texture(material: str, rng: np.random.Generator) -> Image.Image:
    """Fill a canvas with the material that shows in the item's rim."""
    tint = rng.uniform(0.93, 1.05)
    hue, saturation, value = MATERIALS[material]
    layer = Image.new("RGB", (_CANVAS, _CANVAS), _hsv(hue, saturation, value * tint))
    pen = ImageDraw.Draw(layer)
    dark, light = _hsv(hue, saturation * 1.2, value * tint * 0.7), _hsv(hue, saturation * 0.5, value * tint * 1.3)
    if material == "wooden":  # grain
        for y in range(int(rng.integers(9)), _CANVAS, 9):
            bend = int(rng.integers(-6, 7))
            pen.line([(0, y), (_CANVAS // 2, y + bend), (_CANVAS, y)], fill=dark, width=2)
    elif material == "metal":  # a broad shine across
        for x in range(int(rng.integers(40)), 2 * _CANVAS, 46):
            pen.line((x, 0, x - _CANVAS, _CANVAS), fill=light, width=16)
            pen.line((x + 18, 0, x + 18 - _CANVAS, _CANVAS), fill=dark, width=5)
    elif material == "glass":  # thin bright streaks
        for x in range(int(rng.integers(30)), 2 * _CANVAS, 30):
            pen.line((x, 0, x - _CANVAS, _CANVAS), fill=(255, 255, 255), width=6)
    elif material == "ceramic":  # speckled glaze
        for x, y in rng.uniform(0, _CANVAS, size=(160, 2)):
            pen.ellipse((x, y, x + 3, y + 3), fill=_hsv(0.09, 0.4, 0.6))
    elif material == "woollen":  # knitted stitches
        for y, x in itertools.product(range(0, _CANVAS, 10), repeat=2):
            pen.line([(x, y), (x + 5, y + 6), (x + 10, y)], fill=light, width=2)
    else:  # wicker: a weave
        for place in range(0, 2 * _CANVAS, 13):
            pen.line((place, 0, place - _CANVAS, _CANVAS), fill=dark, width=4)
            pen.line((place - _CANVAS, 0, place, _CANVAS), fill=dark, width=4)
    return layer


def _draw_fittings(pen: ImageDraw.ImageDraw, category: str, centre: np.ndarray, radius: float, rng: np.random.Generator) -> None:
    """Draw what sticks out from behind the body and shows the category."""
    x, y = centre
    dark = _hsv(rng.uniform(0, 1), 0.15, 0.35)
    if category == "bag":  # a handle above
        pen.arc((x - radius * 0.55, y - radius * 1.55, x + radius * 0.55, y + radius * 0.3), 180, 360, fill=dark, width=9)
    elif category == "clock":  # two bells above, two feet below
        for side in (-1, 1):
            bell = x + side * radius * 0.6
            pen.ellipse((bell - 17, y - radius * 1.35, bell + 17, y - radius * 1.35 + 34), fill=dark)
            pen.line((x + side * radius * 0.5, y + radius * 0.6, x + side * radius * 0.8, y + radius * 1.25), fill=dark, width=10)
    elif category == "cushion":  # a tassel at each corner
        for corner in itertools.product((-1, 1), repeat=2):
            tip = centre + radius * 1.12 * np.array(corner)
            pen.line([(x, y), tuple(tip)], fill=dark, width=4)
            pen.ellipse((*(tip - 9), *(tip + 9)), fill=dark)
    elif category == "kite":  # a tail with bows
        tail = [(x + math.sin(part * 1.3) * 12, y + radius * 0.7 + part * 8) for part in range(9)]
        pen.line(tail, fill=dark, width=4)
        for bow_x, bow_y in tail[4::2]:
            pen.polygon([(bow_x + right, bow_y + down) for right, down in ((-13, -7), (13, 7), (13, -7), (-13, 7))], fill=dark)
    elif category == "lamp":  # a stand below
        pen.line((x, y, x, y + radius * 1.4), fill=dark, width=10)
        pen.rounded_rectangle((x - radius * 0.6, y + radius * 1.3, x + radius * 0.6, y + radius * 1.3 + 13), radius=6, fill=dark)
    elif category == "mirror":  # a cord to hang it by
        nail = (x, y - radius * 1.48)
        pen.line([(x - radius * 0.75, y - radius * 0.4), nail, (x + radius * 0.75, y - radius * 0.4)], fill=dark, width=5)
        pen.ellipse((nail[0] - 7, nail[1] - 7, nail[0] + 7, nail[1] + 7), fill=dark)
    elif category == "mug":  # a handle at the side
        pen.arc((x + radius * 0.2, y - radius * 0.5, x + radius * 1.5, y + radius * 0.55), 270, 90, fill=dark, width=13)
    else:  # planter: leaves above
        for lean in (-0.9, -0.45, 0.0, 0.45, 0.9):
            tip = (x + radius * lean, y - radius * (1.5 - 0.35 * abs(lean)))
            middle = (x + radius * lean * 0.5, y - radius * 0.9)
            leaf = _hsv(0.33 + rng.normal(0, 0.01), 0.55, 0.42)
            pen.polygon([(x, y - radius * 0.3), (middle[0] - 9, middle[1]), tip, (middle[0] + 9, middle[1])], fill=leaf)


def _draw_front(pen: ImageDraw.ImageDraw, category: str, centre: np.ndarray, radius: float) -> None:
    """Draw what is on the face of a clock (hands) or a mirror (a shine)."""
    x, y = centre
    if category == "clock":
        pen.line([(x, y - radius * 0.5), (x, y), (x + radius * 0.35, y + radius * 0.15)], fill=(30,) * 3, width=6)
        pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill=(30,) * 3)
    elif category == "mirror":
        for left, width in ((-0.3, 9), (0.0, 5)):
            start = x + radius * left
            pen.line((start, y + radius * 0.3, start + radius * 0.35, y - radius * 0.3), fill=(250,) * 3, width=width)


def _draw_brand_mark(pen: ImageDraw.ImageDraw, brand: str, rng: np.random.Generator) -> None:
    """Draw the brand's sign, white on a dark label, in the lower right corner."""
    size = 17 + rng.uniform(-1, 1)
    x, y = _CANVAS - 25 + rng.uniform(-3, 3), _CANVAS - 25 + rng.uniform(-3, 3)
    white, left, right, top, low = (255,) * 3, x - size, x + size, y - size, y + size
    pen.rounded_rectangle((left - 4, top - 4, right + 4, low + 4), radius=8, fill=(45,) * 3, outline=white, width=2)
    if brand == "Norvik":  # a triangle
        pen.polygon([(x, top), (right, low), (left, low)], fill=white)
    elif brand == "Halden":  # two upright bars
        pen.rectangle((left, top, left + 10, low), fill=white)
        pen.rectangle((right - 10, top, right, low), fill=white)
    elif brand == "Solis":  # a full disc
        pen.ellipse((left, top, right, low), fill=white)
    elif brand == "Kumo":  # a ring
        pen.ellipse((left, top, right, low), outline=white, width=8)
    elif brand == "Tarro":  # a T
        pen.rectangle((left, top, right, top + 10), fill=white)
        pen.rectangle((x - 5, top, x + 5, low), fill=white)
    elif brand == "Velia":  # a V
        pen.line([(left, top), (x, low - 3), (right, top)], fill=white, width=9)
    elif brand == "Lumo":  # an L
        pen.rectangle((left, top, left + 9, low), fill=white)
        pen.rectangle((left, low - 9, right, low), fill=white)
    else:  # Brisk: a cross
        pen.line((left, top, right, low), fill=white, width=9)
        pen.line((left, low, right, top), fill=white, width=9)
