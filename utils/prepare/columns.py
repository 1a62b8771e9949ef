"""Which column of a table holds what: usual names, options that name others, and the choice."""
import argparse
from dataclasses import dataclass, field
from pathlib import Path

from utils.common.errors import PerPEFTError

NAMES = {  # usual names of each column, lower case, without "_", " ", "-"; the first that is there is chosen
    "user": ("user", "userid", "reviewerid", "customer", "customerid", "visitorid", "sessionid", "uid"),
    "item": ("item", "itemid", "parentasin", "asin", "movieid", "product", "productid", "articleid", "sku", "iid", "id"),
    "time": ("time", "timestamp", "date", "datetime", "unixreviewtime", "createdat", "eventtime"),
    "rating": ("rating", "overall", "stars", "score"),
    "title": ("title", "name", "itemname", "productname", "producttitle"),
    "image": ("image", "images", "imagepath", "imageurl", "poster", "posterpath", "posterurl", "img", "imgurl", "imurl",
              "picture"),
}  # fmt: skip


@dataclass(frozen=True)
class TableOptions:
    """How a table is to be read where that is not to be recognised.

    Attributes:
        separator, encoding, time_format: None recognises them.
        columns: names of columns by role; a number counts the columns of a table without a header.
    """

    separator: str | None = None
    encoding: str | None = None
    time_format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """The options that `table_options_of` reads."""
    group = parser.add_argument_group("how the tables are written (recognised where not given)")
    group.add_argument("--separator", default=None, help="between the columns, for example ';' or '\\t'")
    group.add_argument("--encoding", default=None, help="of the text, for example latin-1")
    group.add_argument("--time_format", default=None, help="of dates, for example '%%d.%%m.%%Y %%H:%%M'")
    for role in NAMES:
        group.add_argument(
            f"--{role}_column",
            default=None,
            metavar="NAME",
            help=f"column of the {role}; a number where no header names it",
        )


def table_options_of(options: argparse.Namespace) -> TableOptions:
    """What the options say."""
    columns = {role: getattr(options, f"{role}_column") for role in NAMES}
    separator = options.separator and options.separator.replace("\\t", "\t")
    chosen = {role: name for role, name in columns.items() if name is not None}
    return TableOptions(separator, options.encoding, options.time_format, chosen)


def _plain_name(name: str) -> str:
    """A column's name without RecBole's type, case and word separators."""
    return "".join(letter for letter in name.split(":")[0].lower() if letter not in "_- ")


def recognise_columns(
    path: Path, header: list[str], required: tuple[str, ...], optional: tuple[str, ...], options: TableOptions
) -> dict[str, str | None]:
    """The name of each role's column in a header, None for an optional one that is not there.

    Raises:
        PerPEFTError: a required column is missing, or several could be it.
    """
    chosen: dict[str, str | None] = {}
    shown = ", ".join(header[:20])[:300] or "none"
    for role in (*required, *optional):
        named = options.columns.get(role)
        found = [name for name in header if name == named] or [name for name in header if name.lower() == (named or "").lower()]
        if named is not None and not found and role != "item":  # which both tables have, maybe under two names
            raise PerPEFTError(f"{path} has no column '{named}' (--{role}_column); its columns are {shown}")
        if not found:
            by_name = ([name for name in header if _plain_name(name) == usual] for usual in NAMES[role])
            found = next((names for names in by_name if names), [])
        if not found and role in required:
            raise PerPEFTError(f"{path} has no column of the {role}; name it by --{role}_column (its columns are {shown})")
        if len(found) > 1:
            raise PerPEFTError(
                f"{path}, line 1: the columns {', '.join(map(repr, found))} could be the {role}; rename or remove all but one"
                + ("" if len(set(found)) == 1 else f", or choose one by --{role}_column")
            )
        chosen[role] = found[0] if found else None
    return chosen
