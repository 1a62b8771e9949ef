"""Which column of a table holds what: usual names, options that name others, and the choice."""
import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

from utils.common.errors import PerPEFTError

NAMES = {  # usual names of each column, lower case, without "_", " ", "-"; the first that is there is chosen
    "user": ("user", "userid", "reviewerid", "customer", "customerid", "visitorid", "sessionid", "memberid", "uid"),
    "item": ("item", "itemid", "parentasin", "asin", "movieid", "product", "productid", "articleid", "sku", "stockcode", "bookid",
             "gameid", "trackid", "newsid", "videoid", "isbn", "iid", "id"),
    "time": ("timestamp", "unixreviewtime", "datetime", "time", "date", "createdat", "eventtime", "invoicedate", "orderdate",
             "purchasedate", "tdat"),
    "rating": ("rating", "overall", "stars", "score"),
    "title": ("title", "name", "itemname", "productname", "producttitle"),
    "image": ("image", "images", "imagepath", "imageurl", "poster", "posterpath", "posterurl", "img", "imgurl", "imurl",
              "picture"),
}  # fmt: skip


@dataclass(frozen=True)
class TableOptions:
    """How a table is to be read; None recognises it. `columns`: names by role; a number counts those without a header."""

    separator: str | None = None
    encoding: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """The options that `table_options_of` reads."""
    group = parser.add_argument_group("how the tables are written (recognised where not given)")
    group.add_argument("--separator", type=_separator, help="between the columns, for example ';' or '\\t'")
    group.add_argument("--encoding", help="of the text, for example latin-1")
    group.add_argument("--time_format", help="of dates, for example '%%d.%%m.%%Y %%H:%%M'")
    for role in NAMES:
        role_help = f"column of the {role}; a number where no header names it"
        group.add_argument(f"--{role}_column", metavar="NAME", help=role_help)
    group.add_argument("--items_item_column", metavar="NAME", help="that of the items' table, if it is another")


def _separator(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a separator has at least one character")
    return text.replace("\\t", "\t")


def table_options_of(options: argparse.Namespace, of_items: bool = False) -> TableOptions:
    """What the options say of the interactions' table, or of the items'."""
    columns = {role: getattr(options, f"{role}_column") for role in NAMES}
    if of_items and options.items_item_column is not None:
        columns["item"] = options.items_item_column
    chosen = {role: name for role, name in columns.items() if name is not None}
    return TableOptions(options.separator, options.encoding, chosen)


def _named(header: list[str], named: str) -> list[str]:
    """The columns that a user's name stands for: exactly, else in any case and without RecBole's type."""
    exact = [name for name in header if name == named]
    return exact or [name for name in header if named.lower() in (name.lower(), name.split(":")[0].lower())]


def _usual(header: list[str], role: str, is_interactions: bool) -> list[str]:
    """The columns with a role's first usual name that is there."""
    plain = {name: re.sub("[_ -]", "", name.split(":")[0].lower()) for name in header}  # also without RecBole's type
    columns = {usual: [name for name in header if plain[name] == usual] for usual in NAMES[role]}
    if is_interactions:
        columns.pop("id", None)  # the row's there, not the item's
    found = next(filter(None, columns.values()), [])
    return columns["date"] + found if found == columns.get("time") else found  # a day and its hour: neither is enough


def recognise_columns(
    path: Path, header: list[str], required: tuple[str, ...], optional: tuple[str, ...], options: TableOptions
) -> dict[str, str | None]:
    """The name of each role's column in a header, None for an optional one that is not there.

    Raises:
        PerPEFTError: a required column is missing, several could be it, or it is another role's.
    """
    chosen: dict[str, str | None] = {}
    shown = ", ".join(header[:20])[:300] or "none"
    for role in (*required, *optional):
        named = options.columns.get(role)
        found = [] if named is None else _named(header, named)
        if named is not None and not found and role != "item":  # which may be the other table's, see `require_item_columns`
            raise PerPEFTError(f"{path} has no column '{named}' (--{role}_column); its columns are {shown}")
        found = found or _usual(header, role, "user" in required)
        if not found and role in required:
            raise PerPEFTError(f"{path} has no column of the {role}; name it by --{role}_column (its columns are {shown})")
        if len(found) > 1:
            several, same = ", ".join(map(repr, found)), len(set(found)) == 1
            choose = "" if same else f", or choose one by --{role}_column"
            raise PerPEFTError(f"{path}, line 1: the columns {several} could be the {role}; rename or remove all but one{choose}")
        chosen[role] = found[0] if found else None
        first, *others = [other for other, name in chosen.items() if name == chosen[role]]
        if found and others:
            hint = " (--items_item_column names the item's here)" if role == "title" else ""
            raise PerPEFTError(f"{path}: the column '{found[0]}' cannot be the {first} and the {role}; choose two{hint}")
    return chosen


def require_item_columns(options: argparse.Namespace, interactions: dict[str, str | None], items: dict[str, str | None]) -> None:
    """Raise a PerPEFTError unless one of two tables has the column of the item that an option names."""
    for option, tables in (("item_column", (interactions, items)), ("items_item_column", (items,))):
        named = getattr(options, option)
        if named is not None and not _named([columns["item"] for columns in tables], named):
            raise PerPEFTError(f"--{option} {named}: there is no such column; see the columns by --dry_run without it")
