"""Raw ids become image file names that every file system takes, no two alike."""
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import draw_image, write_dataset
from utils.common.errors import PerPEFTError
from utils.data.dataset import read_dataset
from utils.data.image_names import find_image_files, image_file_name, is_raw_id

PLAIN = [
    "B00005N7P0", "a b", " x", "-rf", "~root", "$HOME", "%2e%2e%2f", "é", "／", ".hidden", "CONSOLE", "aCON", "x" * 251,
    "é" * 125,
]  # fmt: skip
ENCODED = {
    "a/b": "id%a%2Fb", "..\\x": "id%..%5Cx", "/etc/passwd": "id%%2Fetc%2Fpasswd", "a:b": "id%a%3Ab",
    'a"<>|?*b': "id%a%22%3C%3E%7C%3F%2Ab",
    "x\0y": "id%x%00y", "tab\there": "id%tab%09here", ".": "id%.", "..": "id%..", "dot.": "id%dot.", "space ": "id%space%20",
    "CON": "id%CON", "nul": "id%nul", "Lpt1.txt": "id%Lpt1.txt", "COM¹": "id%COM%C2%B9", "NUL .x": "id%NUL%20.x",
    "id%a%2Fb": "id%id%25a%252Fb", "ID%x": "id%ID%25x", "é/": "id%%C3%A9%2F", "conin$": "id%conin%24", "CLOCK$": "id%CLOCK%24",
}  # fmt: skip
LONG = ["x" * 252, "é" * 126, "/" * 90]
NO_RAW_ID = ["", "line\nbreak", "end\n", "a\rb", "a\u2028b", "half\ud83d", None, 5, b"B005", ["B005"]]
TEXTS = st.text(st.sampled_from("/\\:%=. idCONnul2Ff\0\né\ud83d"), min_size=1)


def test_a_raw_id_is_its_file_name_or_encoded_or_hashed_where_that_is_too_long():
    for raw_id, name in [*zip(PLAIN, PLAIN), *ENCODED.items()]:
        assert image_file_name(raw_id) == f"{name}.jpg"
    for name in map(image_file_name, LONG):
        assert len(name.encode()) <= 255 and name.startswith("id%=")


@given(TEXTS, TEXTS)
def test_names_differ_as_raw_ids_do(one, other):
    for raw_id in filter(is_raw_id, (one, other)):
        name = image_file_name(raw_id)
        assert len(name.encode()) <= 255 and not set(name) & set('<>:"/\\|?*\0')
    if is_raw_id(one) and is_raw_id(other):
        assert (image_file_name(one) == image_file_name(other)) == (one == other)


def test_what_is_no_raw_id():
    assert [value for value in NO_RAW_ID if is_raw_id(value)] == []


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def test_files_in_the_other_unicode_form_are_found_once():
    ids = {1: COMPOSED, 2: DECOMPOSED, 3: "B3"}
    both = {f"{COMPOSED}.jpg", f"{DECOMPOSED}.jpg", "B3.jpg"}
    assert find_image_files(both, ids) == {1: f"{COMPOSED}.jpg", 2: f"{DECOMPOSED}.jpg", 3: "B3.jpg"}
    assert find_image_files({f"{DECOMPOSED}.jpg"}, ids) == {2: f"{DECOMPOSED}.jpg"}  # it is one item's image, not two items'
    assert find_image_files({f"{DECOMPOSED}.jpg"}, {1: COMPOSED}) == {1: f"{DECOMPOSED}.jpg"}
    assert find_image_files({f"{COMPOSED}.jpg"}, {1: DECOMPOSED}) == {1: f"{COMPOSED}.jpg"}


def test_an_image_that_another_program_named_plainly_is_found():
    assert find_image_files({"a:b.jpg"}, {1: "a:b"}) == {1: "a:b.jpg"}
    assert find_image_files({"id%a%3Ab.jpg", "a:b.jpg"}, {1: "a:b"}) == {1: "id%a%3Ab.jpg"}
    assert find_image_files({"id%a%2Fb.jpg"}, {1: "id%a%2Fb", 2: "a/b"}) == {2: "id%a%2Fb.jpg"}  # not the encoded-looking id's


def test_a_data_set_with_such_ids_is_read(tmp_path, capsys):
    ids = ["a/b", "../up", "CON", "x" * 300, COMPOSED, "tab\there"]
    folder = write_dataset(tmp_path, "shop", {1: [1, 2, 3, 4, 5, 6]}, ["a lamp"] * 6, raw_ids=ids, draw=False)
    names = [*(image_file_name(raw_id) for raw_id in ids[:4]), f"{DECOMPOSED}.jpg", image_file_name(ids[5])]
    for item, name in enumerate(names, 1):
        draw_image(item).save(folder / "shop_images" / name)
    dataset = read_dataset(folder, "shop")
    assert dataset.raw_ids == ids and [path.name for path in dataset.image_paths] == names
    assert all(path.parent == folder / "shop_images" for path in dataset.image_paths)
    (folder / "shop_images" / "id%..%2Fup.jpg").unlink()
    with pytest.raises(PerPEFTError, match=r"id%\.\.%2Fup\.jpg \(item 2\)"):
        read_dataset(folder, "shop")
