"""The two tables of a shop, read into DuckDB and reduced to the interactions that a data set holds."""
from dataclasses import dataclass, field

from utils.common.errors import PerPEFTError
from utils.data.image_names import is_raw_id
from utils.prepare import interactions
from utils.prepare.engine import one_value
from utils.prepare.image_cells import ImageFinder, is_there
from utils.prepare.parts import BLANK, NO_OBJECT
from utils.prepare.tables import ROWS, LeftOut, Table
from utils.prepare.titles import clean_title

FIRST_ROWS = 5  # that a dry run shows


@dataclass
class Shop:
    """Two tables to make a data set of.

    Attributes:
        interactions: with the roles user, item, time and, if `min_rating` is set, rating.
        items: with the roles item, title, image.
        time_format: of dates; None for ISO dates and numbers.
        min_rating: interactions with a lower rating are left out; None keeps all.
        first_row_counts: of differing rows for one item the first counts; otherwise they are an error.
        removed: how many usable interactions were removed, by reason.
    """

    interactions: Table
    items: Table
    finder: ImageFinder
    time_format: str | None = None
    min_rating: float | None = None
    first_row_counts: bool = False
    items_left_out: LeftOut = field(default_factory=dict)
    interactions_read: int = 0
    interactions_left_out: LeftOut = field(default_factory=dict)
    removed: LeftOut = field(default_factory=dict)

    def __post_init__(self):
        self.con = self.items.con

    def read(self, strict: bool, stable_keys: bool) -> None:
        """Make the tables `items` (number, raw_id, title, source) and `kept` (user, item, rank); `stable_keys` as in `stage`.

        Raises:
            PerPEFTError: nothing can be used, rows of one item differ, times of two kinds are mixed, or, if `strict`, a row
                cannot be used.
        """
        self._read_items(strict)
        self.interactions_read = interactions.stage(self.interactions, self.time_format, self.min_rating, stable_keys)
        self.interactions_left_out = self.interactions.left_out("staged")
        if strict:
            _refuse(self.interactions, self.interactions_left_out)
        interactions.require_one_kind_of_time(self.interactions)
        self.removed["not the user's first of the item"] = interactions.keep_first(self.con), ""
        if not one_value(self.con, "SELECT count(*) FROM kept"):
            raise PerPEFTError(self._why_nothing())
        self.con.execute("DROP VIEW staged; DROP TABLE interactions")

    def _read_items(self, strict: bool) -> None:
        con = self.con
        con.create_function("find_image", self.finder.find, ["VARCHAR"] * 2, "VARCHAR", null_handling="special")
        for function, kind in ((clean_title, "VARCHAR"), (is_there, "BOOLEAN"), (is_raw_id, "BOOLEAN")):
            con.create_function(function.__name__, function, ["VARCHAR"], kind, null_handling="special")
        self.items.create("item_rows", f"""
            WITH found AS (SELECT file, problem, item AS raw_id, nullif(clean_title(coalesce(title, '')), '') AS title,
                                  find_image(item, image) AS source
                           FROM {ROWS})
            SELECT *, CASE WHEN problem IS NOT NULL THEN problem WHEN raw_id IS NULL THEN 'item missing'
                      WHEN NOT is_raw_id(raw_id) THEN 'item with a line break' WHEN title IS NULL THEN 'no title'
                      WHEN source IS NULL THEN 'no image' WHEN NOT is_there(source) THEN 'image file not found' END AS reason
            FROM found""")  # fmt: skip
        self.items_left_out = self.items.left_out("(SELECT rowid AS place, reason FROM item_rows)")
        differing = con.execute("""
            SELECT raw_id FROM item_rows WHERE reason IS NULL
            GROUP BY raw_id HAVING count(DISTINCT (title, source)) > 1 ORDER BY min(rowid)""").fetchall()
        if differing and not self.first_row_counts:
            raise PerPEFTError(self._differing(differing[0][0], len(differing)))
        usable = one_value(con, """
            CREATE TABLE items AS SELECT (row_number() OVER (ORDER BY raw_id))::INTEGER AS number, * FROM (
                SELECT raw_id, arg_min(title, rowid) AS title, arg_min(source, rowid) AS source FROM item_rows
                WHERE reason IS NULL GROUP BY raw_id)""")  # fmt: skip
        if not usable:
            reasons = format_left_out(self.items_left_out) or "it has no rows"
            raise PerPEFTError(f"{self.items.files[0]} has no item with an id, a title and an image ({reasons})")
        if strict:
            _refuse(self.items, self.items_left_out)
        rows = one_value(con, "SELECT count(*) FROM item_rows WHERE reason IS NULL")
        self.items_left_out["listed again"] = rows - usable, ""

    def _differing(self, raw_id: str, count: int) -> str:
        rows = self.con.execute(
            "SELECT min(rowid), title, source FROM item_rows WHERE raw_id = ? AND reason IS NULL "
            "GROUP BY title, source ORDER BY 1 LIMIT 2", [raw_id],
        ).fetchall()  # fmt: skip
        shown = [f"{self.items.where(place)} {title[:100], source[:100]}" for place, title, source in rows]
        more = f"; {count:,} items have such rows" if count > 1 else ""
        return f"{self.items.files[0]}: two rows of item {raw_id[:60]!r} differ: {' and '.join(shown)}; keep one{more}"

    def _why_nothing(self) -> str:
        """Why no interaction can be used."""
        name = self.interactions.files[0]
        reasons = format_left_out(self.interactions_left_out) or "it has no rows"
        if interactions.UNKNOWN in self.interactions_left_out:
            ids = [[row[0][:40] for row in table.first_rows(["item"], 3)] for table in (self.interactions, self.items)]
            alike = self.con.execute("""
                SELECT x.item, raw_id FROM (SELECT unnest(?::VARCHAR[]) AS item) x JOIN items
                ON regexp_replace(lower(x.item), '^0+|\\.0+$', '', 'g') = regexp_replace(lower(raw_id), '^0+|\\.0+$', '', 'g')
                LIMIT 1""",
                [[item for (item,) in self.interactions.first_rows(["item"], 10_000)]]).fetchone()  # fmt: skip
            other = "choose other columns by --item_column and --items_item_column"
            hint = f"; write {alike[0]!r} and {alike[1]!r} alike" if alike else f"; do both files fit together? Else {other}"
            reasons += f"; its items are {ids[0]}, those of {self.items.files[0].name} {ids[1]}{hint}"
        elif NO_OBJECT in self.interactions_left_out:
            reasons += "; scripts.prepare_tables reads other tables than Amazon's"
        elif interactions.UNREADABLE_TIME in self.interactions_left_out:
            text = self.interactions.first_rows(["time"], 1)[0][0]
            reasons += f"; write the form of times such as {text[:40]!r} as --time_format, for example '%d.%m.%Y %H:%M'"
        return f"{name}: no interaction can be used ({reasons})"

    def describe(self) -> str:
        """The columns chosen in each table, and its first rows."""
        lines = []
        for heading, table in (("interactions", self.interactions), ("items", self.items)):
            rows = table.first_rows([role for role, name in table.columns.items() if name], FIRST_ROWS)
            cells = [[" ".join((cell or "").split())[:60] for cell in row] for row in rows]
            lines += [table.describe(heading), *(f"| {' | '.join(row)}" for row in cells)]
        return "\n".join(lines)


def format_left_out(rows: LeftOut) -> str:
    """Every reason with its count and first lines, in one sentence."""
    return ", ".join(f"{reason}: {count:,} ({lines})" for reason, (count, lines) in rows.items())


def _refuse(table: Table, rows: LeftOut) -> None:
    wrong = {reason: found for reason, found in rows.items() if reason not in (BLANK, interactions.LOW)}
    if wrong:
        raise PerPEFTError(f"{table.files[0]}: rows that cannot be used (--strict): {format_left_out(wrong)}")
