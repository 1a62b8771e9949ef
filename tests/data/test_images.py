"""Images of every mode are decoded to the 8-bit RGB values that a person would see."""
import numpy as np
import pytest
from PIL import Image

from utils.data.images import decoded_image

SIXTEEN_BITS = {0: 0, 128: 0, 129: 1, 257: 1, 32768: 128, 65406: 254, 65407: 255, 65535: 255}


def decoded(image, kind, tmp_path, **options):
    image.save(tmp_path / "image", kind, **options)
    with decoded_image(tmp_path / "image") as found:
        assert found.mode == "RGB"
        return np.asarray(found)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_by_their_range(kind, tmp_path):
    grey = Image.fromarray(np.array([list(SIXTEEN_BITS)], dtype=np.uint16))
    found = decoded(grey, kind, tmp_path)
    assert found.tolist() == [[[value] * 3 for value in SIXTEEN_BITS.values()]]
    dark = Image.fromarray(np.array([[0, 257]], dtype=np.uint16))  # by the range of 16 bits, not by the brightest pixel
    assert decoded(dark, kind, tmp_path)[0, :, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    "values, dtype, expected",
    [
        (list(SIXTEEN_BITS), np.int32, list(SIXTEEN_BITS.values())),
        ([0, 2**31 - 1, 2**30, -5], np.int32, [0, 255, 128, 0]),
        ([0.0, 0.5, 1.0, -1.0, float("nan")], np.float32, [0, 128, 255, 0, 0]),
        ([0.0, 1.5, 254.6, 255.0], np.float32, [0, 2, 255, 255]),
        ([0.0, 257.0, 65535.0], np.float32, [0, 1, 255]),
        ([0.0, 1e30, float("inf")], np.float32, [0, 255, 255]),
    ],
)
def test_values_of_32_bits_are_scaled_by_the_smallest_range_that_holds_them(values, dtype, expected, tmp_path):
    image = Image.fromarray(np.array([values], dtype=dtype))
    assert decoded(image, "TIFF", tmp_path)[0, :, 2].tolist() == expected


def test_transparent_images_are_put_on_white(tmp_path):
    red = Image.fromarray(np.array([[[200, 0, 0, alpha] for alpha in (0, 51, 255)]], dtype=np.uint8))
    on_white = [[255, 255, 255], [244, 204, 204], [200, 0, 0]]
    assert decoded(red, "PNG", tmp_path).tolist() == [on_white]
    grey = Image.fromarray(np.array([[[100, 0], [100, 255]]], dtype=np.uint8))
    assert decoded(grey, "PNG", tmp_path)[0, :, 1].tolist() == [255, 100]
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((0, 0), 0)
    for kind in ("PNG", "GIF"):
        assert decoded(palette, kind, tmp_path, transparency=0)[0, :, 0].tolist() == [255, 9]
    assert decoded(palette, "PNG", tmp_path, transparency=bytes((0, 51)))[0, :, 0].tolist() == [255, 206]
    for mode, key in (("L", 7), ("RGB", (7, 7, 7))):
        assert decoded(Image.new(mode, (1, 1), key), "PNG", tmp_path, transparency=key).tolist() == [[[255, 255, 255]]]
    assert decoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", tmp_path).tolist() == [[[1, 2, 3]]]
