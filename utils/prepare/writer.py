"""A data set's files from a shop's tables: the core, titles, images, and a report of what was left out."""
import argparse
import csv
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
from utils.prepare.engine import engine, shown_progress
from utils.prepare.image_cells import WEB
from utils.prepare.image_folder import Filling, fill_folder, read_image
from utils.prepare.interactions import keep_core, keep_sample
from utils.prepare.parts import quote
from utils.prepare.shop import LeftOut, Shop, format_columns, format_left_out, format_lines

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
            described = shop.describe(con)
            _select(options, shop, con)
            return f"{described}\n{_tables(options, shop, con, {})}\nNothing was written (--dry_run); no image was opened."
    options.train_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(options.train_dir / f".{options.name}_prepare.lock", timeout=0), engine(options.train_dir) as con:
            shop = open_shop(con)
            _select(options, shop, con)
            filling = _fetch(options, shop, con)
            _write(options, con)
            return _report(options, shop, con, filling)
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


def _select(options: argparse.Namespace, shop: Shop, con: duckdb.DuckDBPyConnection) -> None:
    """Read the tables and keep the core."""
    shop.read(con, options.strict, stable_keys=options.max_users is not None)
    if options.max_users is not None:
        shop.removed["of users not drawn"] = keep_sample(con, options.max_users, options.core, options.seed)
    shop.removed[f"outside the {options.core}-core"] = keep_core(con, options.core)
    reasons = format_left_out(shop.interactions_left_out)
    _require_enough(con, options, f" (of {shop.interactions_read:,} interactions read, left out: {reasons})" if reasons else "")


def _require_enough(con: duckdb.DuckDBPyConnection, options: argparse.Namespace, when: str) -> None:
    longest = con.execute("SELECT max(count) FROM users").fetchone()[0]
    if longest is None:
        more_users = "" if options.max_users is None else " or raise --max_users"
        raise PerPEFTError(f"no users and items with {options.core} interactions each are left{when}; lower --core{more_users}")
    if longest < FEWEST_INTERACTIONS:
        raise PerPEFTError(f"no user has the {FEWEST_INTERACTIONS} interactions that evaluation needs{when}")


def _fetch(options: argparse.Namespace, shop: Shop, con: duckdb.DuckDBPyConnection) -> Filling:
    """Fill the folder of images, list what failed, and leave those items out."""
    folder, failures = _file(options, "_images"), _file(options, "_failed_images.csv")
    query = "SELECT raw_id, source FROM items JOIN used ON number = item ORDER BY number"
    sources = dict(con.execute(query).fetchall())
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
        write_atomically(failures, lambda path: _write_failures(path, sources, filling.failed))
    if len(filling.failed) == len(sources):
        reason = next(iter(filling.failed.values()))
        raise PerPEFTError(f"all {len(sources):,} images failed (the first: {reason}); see {failures}")
    if filling.failed:
        failed = "SELECT number FROM items WHERE raw_id IN (SELECT unnest(?::VARCHAR[]))"
        deleted = con.execute(f"DELETE FROM kept WHERE item IN ({failed})", [list(filling.failed)]).fetchone()[0]
        shop.removed["of items whose image failed, and outside the core without them"] = deleted + keep_core(con, options.core)
        _require_enough(con, options, f" once {len(filling.failed):,} items without image are left out")
    return filling


def _write_failures(path: Path, sources: dict[str, str], failed: dict[str, str]) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("raw_id", "source", "reason"))
        writer.writerows((raw_id, sources[raw_id], reason) for raw_id, reason in sorted(failed.items()))


def _write(options: argparse.Namespace, con: duckdb.DuckDBPyConnection) -> None:
    """Number users and items from 1, users by their first interaction and items by their raw ids; write the three files."""
    titles = con.execute("SELECT raw_id, title FROM items JOIN used ON number = item ORDER BY number").fetchall()
    con.execute("CREATE TABLE user_numbers AS SELECT user, (row_number() OVER (ORDER BY first))::INTEGER AS number FROM users")
    con.execute("CREATE TABLE item_numbers AS SELECT item, (row_number() OVER (ORDER BY item))::INTEGER AS number FROM used")
    lines = """
        SELECT users.number, items.number FROM kept JOIN user_numbers users USING (user) JOIN item_numbers items USING (item)
        ORDER BY users.number, rank"""
    for ending in ("_final.txt", "_preX.pt", "_preX.json"):  # from here on an old data set is being replaced
        _file(options, ending).unlink(missing_ok=True)
    write_pickle(_file(options, "_item2id_final.pickle"), {item: raw_id for item, (raw_id, _) in enumerate(titles, 1)})
    write_pickle(_file(options, "_texts_final.pickle"), dict(titles))

    def write_lines(path: Path) -> None:
        con.execute(f"COPY ({lines}) TO {quote(path)} (FORMAT csv, DELIMITER ' ', HEADER false)")

    final = _file(options, "_final.txt")
    with shown_progress(con, final.name):
        write_atomically(final, write_lines)


def _tables(options: argparse.Namespace, shop: Shop, con: duckdb.DuckDBPyConnection, images: dict[str, int]) -> str:
    """What was read, left out and kept, as a table."""
    users, items, kept = con.execute("SELECT count(*), (SELECT count(*) FROM used), sum(count) FROM users").fetchone()
    parts = {
        "items left out": _counts(shop.items_left_out) | {"listed again": (shop.items_again, "")},
        "interactions": {"read": (shop.interactions_read, "")},
        "interactions left out": _counts(shop.interactions_left_out) | {what: (n, "") for what, n in shop.removed.items()},
        "images": {what: (count, "") for what, count in images.items()},
        f"data set '{options.name}'": {"users": (users, ""), "items": (items, ""), "interactions": (kept, "")},
    }
    lines = []
    for heading, rows in parts.items():
        shown = {what: row for what, row in rows.items() if row[0] or heading == "images"}
        lines += [heading] if shown else []
        lines += [f"  {what:<64}{count:>14,}  {first}".rstrip() for what, (count, first) in shown.items()]
    return "\n".join(lines)


def _counts(left_out: LeftOut) -> dict[str, tuple[int, str]]:
    return {reason: (count, format_lines(count, lines)) for reason, (count, lines) in left_out.items()}


def _report(options: argparse.Namespace, shop: Shop, con: duckdb.DuckDBPyConnection, filling: Filling) -> str:
    """The columns chosen, what was read, left out and kept, and the next command."""
    images = {"fetched": filling.fetched, "already there": filling.kept, "failed": len(filling.failed)}
    lines = [format_columns("interactions", shop.interactions), format_columns("items", shop.items)]
    lines.append(_tables(options, shop, con, images))
    if filling.failed:
        failures = _file(options, "_failed_images.csv")
        lines.append(f"{failures} lists the failed images with the reasons; their items are left out.")
    users = con.execute("SELECT count(*) FROM users").fetchone()[0]
    command = ["python3", "-m", "scripts.check_data", "--dataset", options.name, "--train_dir", str(options.train_dir)]
    command += ["--C", str(users)] if users < default_groups(options.name) else []
    return "\n".join([*lines, f"Next: {shlex.join(command)}"])
