"""HTML pages as a parser sees them."""
import re
from xml.etree import ElementTree


class Parsed:
    """A page's elements; the parser refuses one that is not closed where it must be, and an attribute given twice."""

    def __init__(self, text):
        # our pages never close <meta> and <br>, which XML does not know
        self.root = ElementTree.fromstring(re.sub(r"(<(meta|br)\b[^>]*)>", r"\1/>", text))
        self.elements = [(element.tag, element.attrib) for element in self.root.iter()]
        self.text = re.sub(r"\s+", " ", "".join(self.root.itertext()))

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]

    def cards(self, kind):
        """The ids of the cards of users or items."""
        return [attributes["id"] for attributes in self.all("article") if attributes["id"].startswith(f"{kind}-")]


def check_page(path):
    """What holds for every page; returns it parsed."""
    page = Parsed(path.read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not [name for name in attributes if name.startswith("on")]
        for target in [attributes[name] for name in ("href", "src", "xlink:href") if name in attributes]:
            own = target.startswith("#") and target[1:] in ids
            assert own or target.startswith(("data:image/jpeg;base64,", "data:image/png;base64,")), f"{target} leads nowhere"
        for reference in re.findall(r"url\(([^)]*)\)", attributes.get("style", "") + attributes.get("clip-path", "")):
            assert reference.lstrip("#") in ids
        assert attributes.get("aria-labelledby", ids[0]) in ids
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or (attributes["role"] == "img" and attributes["aria-label"])
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    style = page.root.findtext("head/style")
    assert "prefers-color-scheme" in style and "url(" not in style and "@import" not in style
    headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(headings, headings[1:]))  # no level is left out
    assert len(page.all("caption")) == len(page.all("table"))
    assert page.all("html")[0]["lang"] == "en"
    return page


def classes(page, name):
    return [attributes for _, attributes in page.elements if name in attributes.get("class", "").split()]
