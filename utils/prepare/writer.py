"""A data set's files from a shop's tables: the core, titles, images, and a report of what was left out."""
import argparse
import csv
import io
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import duckdb
from filelock import FileLock, Timeout

from utils.common.console import SHARED_OPTIONS, number
from utils.common.errors import PerPEFTError
from utils.common.files import write_atomically, write_pickle
from utils.data.dataset import default_groups, is_dataset_name
from utils.data.histories import FEWEST_INTERACTIONS
from utils.prepare.downloads import Downloader
from utils.prepare.engine import engine, one_value, shown_progress
from utils.prepare.image_cells import WEB
from utils.prepare.image_folder import Filling, fill_folder, read_image
from utils.prepare.interactions import keep_core, keep_sample
from utils.prepare.parts import quote
from utils.prepare.shop import Shop, format_left_out

LONGEST_NAME = 200  # bytes of a data set's name: the longest ending and a temporary one must fit behind it


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """The options of the data set that `prepare` makes."""
    add = parser.add_argument
    add("--name", required=True, help="name of the data set to make")
    add("--train_dir", type=Path, default=Path("./dataset"), help="folder of the data sets")
    add("--core", type=number(int, 1), default=5, help="interactions that every user and item kept must have; 1 keeps all")
    sample_help = "a seeded random sample of so many of the users with --core interactions, taken before the core is formed"
    add("--max_users", type=number(int, 1, 2**31), help=f"{sample_help}, so that fewer remain (default: all)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of --max_users")
    add("--restart", action="store_true", help="replace a data set of that name; its images stay")
    add("--strict", action="store_true", help="rows that cannot be used are an error instead of being left out")
    add("--dry_run", action="store_true", help="show columns, first rows and counts, and write nothing")
    add("--debug", **SHARED_OPTIONS["--debug"])


def add_image_options(parser: argparse.ArgumentParser, images_help: str) -> None:
    """The options of the images that `prepare` fetches."""
    add = parser.add_argument_group("images").add_argument
    add("--images", type=Path, help=images_help)
    add("--workers", type=number(int, 1, 256), default=16, help="images fetched at once")
    add("--retries", type=number(int, 0, 20), default=3, help="further attempts where one may help")
    add("--timeout", type=number(float, 0, 3600, above=True), default=30, help="seconds without an answer")
    seconds = number(float, 0, 86400, above=True)
    add("--deadline", type=seconds, default=120, help="seconds an image may take with all attempts")
    add("--max_image_bytes", type=number(int, 1, 2**30), default=10 * 2**20, help="largest image taken")
    give_up_help = "stop after so many images in a row without a usable answer; 0: never"
    add("--give_up", type=number(int, 0), default=100, help=give_up_help)


def prepare(options: argparse.Namespace, open_shop: Callable[[duckdb.DuckDBPyConnection], Shop]) -> str:
    """Make a data set; `{name}_final.txt` comes last, so that without it nothing counts as made.

    Items whose image fails are left out and the core is formed again. Interrupted, the same call continues with the images
    that are missing.

    Returns:
        a report: what was read, what was left out and why, what remained, and the next command
    Raises:
        PerPEFTError: the name cannot be used or is in use, nothing is left, or every image failed.
    """
    _require_name(options)
    if options.dry_run:
        with engine(Path(tempfile.gettempdir())) as con:
            shop = open_shop(con)
            described = shop.describe()
            _select(options, shop)
            return f"{described}\n{_tables(options, shop, {})}\nNothing was written (--dry_run); no image was opened."
    options.train_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(options.train_dir / f".{options.name}_prepare.lock", timeout=0), engine(options.train_dir) as con:
            shop = open_shop(con)
            _select(options, shop)
            filling = _fetch(options, shop)
            _write(options, con)
            return _report(options, shop, filling)
    except Timeout:
        raise PerPEFTError(f"another process is making data set '{options.name}' in {options.train_dir}") from None


def _file(options: argparse.Namespace, ending: str) -> Path:
    return options.train_dir / f"{options.name}{ending}"


def _require_name(options: argparse.Namespace) -> None:
    if not is_dataset_name(options.name) or len(options.name.encode(errors="replace")) > LONGEST_NAME:
        raise PerPEFTError(f"--name '{options.name[:60]}': expected a short name, not a path; --train_dir is its folder")
    if options.name == "demo":
        raise PerPEFTError("'demo' is the data set that the training scripts draw themselves; choose another --name")
    final = _file(options, "_final.txt")
    if final.exists() and not options.restart:
        raise PerPEFTError(f"{final} exists already; choose another --name, or replace it by --restart")


def _select(options: argparse.Namespace, shop: Shop) -> None:
    """Read the tables and keep the core."""
    shop.read(options.strict, stable_keys=options.max_users is not None)
    if options.max_users is not None:
        shop.removed["of users not drawn"] = keep_sample(shop.con, options.max_users, options.core, options.seed), ""
    shop.removed[f"outside the {options.core}-core"] = keep_core(shop.con, options.core), ""
    reasons = format_left_out(shop.interactions_left_out)
    when = f" (of {shop.interactions_read:,} interactions read, left out: {reasons})" if reasons else ""
    _require_enough(options, shop, when)


def _require_enough(options: argparse.Namespace, shop: Shop, when: str) -> None:
    longest = one_value(shop.con, "SELECT max(count) FROM users")
    if longest is None:
        more_users = "" if options.max_users is None else " or raise --max_users"
        raise PerPEFTError(f"no users and items with {options.core} interactions each are left{when}; lower --core{more_users}")
    if longest < FEWEST_INTERACTIONS:
        raise PerPEFTError(f"no user has the {FEWEST_INTERACTIONS} interactions that evaluation needs{when}")


def _fetch(options: argparse.Namespace, shop: Shop) -> Filling:
    """Fill the folder of images, list what failed, and leave those items out."""
    folder, failures = _file(options, "_images"), _file(options, "_failed_images.csv")
    query = "SELECT raw_id, source FROM items JOIN used ON number = item ORDER BY number"
    sources = dict(shop.con.execute(query).fetchall())
    web = Downloader(options.retries, options.timeout, options.deadline, options.max_image_bytes)

    def get(source: str) -> bytes:
        return web.get(source) if source.lower().startswith(WEB) else read_image(source)

    try:
        filling = fill_folder(folder, sources, get, options.workers, web.stop, options.give_up)
    except (KeyboardInterrupt, OSError):
        print(f"the images so far are in {folder}; the same command continues from there", file=sys.stderr)
        raise
    failures.unlink(missing_ok=True)
    if filling.failed:
        rows = sorted((raw_id, sources[raw_id], reason) for raw_id, reason in filling.failed.items())
        csv.writer(table := io.StringIO()).writerows([("raw_id", "source", "reason"), *rows])
        write_atomically(failures, lambda path: path.write_bytes(table.getvalue().encode(errors="backslashreplace")))
        if len(rows) == len(sources):
            reason = next(iter(filling.failed.values()))
            raise PerPEFTError(f"all {len(sources):,} images failed (the first: {reason}); see {failures}")
        failed = "SELECT number FROM items WHERE raw_id IN (SELECT unnest(?::VARCHAR[]))"
        (deleted,) = shop.con.execute(f"DELETE FROM kept WHERE item IN ({failed})", [list(filling.failed)]).fetchone()
        outside = keep_core(shop.con, options.core)
        shop.removed["of items whose image failed, and outside the core without them"] = deleted + outside, ""
        _require_enough(options, shop, f" once {len(rows):,} items without image are left out")
    return filling


def _write(options: argparse.Namespace, con: duckdb.DuckDBPyConnection) -> None:
    """Number users and items from 1, users by their first interaction and items by their raw ids; write the three files."""
    titles = con.execute("SELECT raw_id, title FROM items JOIN used ON number = item ORDER BY number").fetchall()
    for ending in ("_final.txt", "_preX.pt", "_preX.json"):  # from here on an old data set is being replaced
        _file(options, ending).unlink(missing_ok=True)
    write_pickle(_file(options, "_item2id_final.pickle"), {item: raw_id for item, (raw_id, _) in enumerate(titles, 1)})
    write_pickle(_file(options, "_texts_final.pickle"), dict(titles))
    copy = """
        COPY (
            SELECT u.number, i.number FROM kept
            JOIN (SELECT user, row_number() OVER (ORDER BY first) AS number FROM users) u USING (user)
            JOIN (SELECT item, row_number() OVER (ORDER BY item) AS number FROM used) i USING (item)
            ORDER BY u.number, rank
        ) TO {} (FORMAT csv, DELIMITER ' ', HEADER false)"""
    final = _file(options, "_final.txt")
    with shown_progress(con, final.name):
        write_atomically(final, lambda path: con.execute(copy.format(quote(path))))


def _tables(options: argparse.Namespace, shop: Shop, images: dict[str, int]) -> str:
    """What was read, left out and kept, as a table."""
    users, items, kept = shop.con.execute("SELECT count(*), (SELECT count(*) FROM used), sum(count) FROM users").fetchone()
    parts = {
        "items left out": shop.items_left_out,
        "interactions": {"read": (shop.interactions_read, "")},
        "interactions left out": shop.interactions_left_out | shop.removed,
        "images": {what: (count, "") for what, count in images.items()},
        f"data set '{options.name}'": {"users": (users, ""), "items": (items, ""), "interactions": (kept, "")},
    }
    lines = []
    for heading, rows in parts.items():
        shown = {what: row for what, row in rows.items() if row[0] or heading == "images"}
        lines += [heading] if shown else []
        lines += [f"  {what:<64}{count:>14,}  {first}".rstrip() for what, (count, first) in shown.items()]
    return "\n".join(lines)


def _report(options: argparse.Namespace, shop: Shop, filling: Filling) -> str:
    """The columns chosen, what was read, left out and kept, and the next command."""
    images = {"fetched": filling.fetched, "already there": filling.kept, "failed": len(filling.failed)}
    lines = [shop.interactions.describe("interactions"), shop.items.describe("items")]
    lines.append(_tables(options, shop, images))
    if filling.failed:
        failures = _file(options, "_failed_images.csv")
        lines.append(f"{failures} lists the failed images with the reasons; their items are left out.")
    users = one_value(shop.con, "SELECT count(*) FROM users")
    command = ["python3", "-m", "scripts.check_data", "--dataset", options.name, "--train_dir", str(options.train_dir)]
    command += ["--C", str(users)] if users < default_groups(options.name) else []
    return "\n".join([*lines, f"Next: {shlex.join(command)}"])
