"""Titles become one printable line."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.prepare.titles import clean_title


@pytest.mark.parametrize("title, clean", [
    ("Lamp &amp; Shade", "Lamp & Shade"),
    ("&lt;b&gt;Lamp&lt;/b&gt; <br/>red<!-- new -->", "Lamp red"),
    ("  Lamp\t\n red\x00\x1b[31m ", "Lamp red [31m"),
    ("5 < 6 and 7 > 6, I <3 it", "5 < 6 and 7 > 6, I <3 it"),
    ("La\u00admp\u200b \ud800\ufeff\u202e", "Lamp"),
    ("Lämpe 灯 💡", "Lämpe 灯 💡"),
    ("<p></p>&nbsp;\u3000", ""),
])  # fmt: skip
def test_titles(title, clean):
    assert clean_title(title) == clean


@given(st.text())
def test_clean_titles_print_and_stay(title):
    clean = clean_title(title)
    assert clean.isprintable() and clean == " ".join(clean.split())
    clean.encode()
