"""Raw ids and the names of their image files: `{raw id}.jpg` wherever that can be a file name, else an encoded name.

An encoded name is "id%" and the raw id percent-encoded as in URLs (`a/b` -> `id%a%2Fb.jpg`), or "id%=" and the raw id's
SHA-256 where that would be longer than file systems take. No two raw ids share a name. (A file system that ignores case, as
on Windows and macOS, cannot hold images of two ids that differ in case alone.)
"""
import hashlib
import re
import unicodedata
from collections.abc import Mapping
from functools import partial
from urllib.parse import quote

RAW_ID_RULE = "a non-empty text without a line break"
ENCODED = "id%"
MAX_BYTES = 251  # with .jpg, the longest name that file systems take
UNSAFE = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]|[. ]$')
# devices on Windows, whatever follows the first dot
RESERVED = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|CLOCK\$|(COM|LPT)[0-9¹²³]) *(\.|$)", re.IGNORECASE)


def is_raw_id(value: object) -> bool:
    """Whether a value can be an item's raw id: see RAW_ID_RULE. Lists of ids are written with one id per line."""
    # half of a surrogate pair cannot be written to a file
    return isinstance(value, str) and value.splitlines() == [value] and not re.search("[\ud800-\udfff]", value)


def image_file_name(raw_id: str) -> str:
    """The name of an item's image file, usable on Linux, macOS and Windows alike; `is_raw_id` must hold for the raw id."""
    plain = not (UNSAFE.search(raw_id) or RESERVED.match(raw_id) or raw_id.lower().startswith(ENCODED))
    if plain and len(raw_id.encode()) <= MAX_BYTES:
        return f"{raw_id}.jpg"
    encoded = ENCODED + quote(raw_id, safe="")
    if len(encoded) > MAX_BYTES:
        encoded = f"{ENCODED}={hashlib.sha256(raw_id.encode()).hexdigest()}"  # percent-encoding leaves no "="
    return f"{encoded}.jpg"


def find_image_files(names: set[str], raw_ids: Mapping[int, str]) -> dict[int, str]:
    """The image files among the names in a folder, by item number, of the items that have one.

    Found are also names in another Unicode form than their raw id (macOS writes decomposed letters), and `{raw id}.jpg` where
    another program wrote it for an id whose name is encoded here.
    """
    expected = {item: image_file_name(raw_id) for item, raw_id in raw_ids.items()}
    found = {item: name for item, name in expected.items() if name in names}
    if len(found) < len(expected):
        composed = partial(unicodedata.normalize, "NFC")
        free = {composed(name): name for name in sorted(names.difference(expected.values()))}
        for item in [item for item in expected if item not in found]:
            other = free.pop(composed(expected[item]), None) or free.pop(composed(f"{raw_ids[item]}.jpg"), None)
            if other:
                found[item] = other
    return found
