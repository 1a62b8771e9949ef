"""Titles as shops write them, made fit to read: no HTML, no control characters, single spaces."""
import html
import re
import unicodedata

TAG = re.compile(r"<!--.*?-->|</?[a-zA-Z][^<>]*>", re.DOTALL)
INVISIBLE = ("Cf", "Cs", "Co", "Cn")  # formatting, half surrogate pairs, private and unassigned characters


def clean_title(title: str) -> str:
    """A title without HTML entities, tags, control and invisible characters, on one line; empty where nothing is left."""
    title = TAG.sub(" ", html.unescape(TAG.sub(" ", title)))  # twice, since some shops write &lt;b&gt;
    if not title.isprintable():
        kinds = [unicodedata.category(letter) for letter in title]
        title = "".join(" " if kind == "Cc" else letter for letter, kind in zip(title, kinds) if kind not in INVISIBLE)
    return " ".join(title.split())
