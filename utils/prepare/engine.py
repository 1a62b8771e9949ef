"""DuckDB as it is used here: bounded memory, queries that a signal ends, and a progress bar."""
import contextlib
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
from tqdm import tqdm

from utils.prepare.parts import quote

MEMORY = "1GB"  # of DuckDB; the process stays below 2 GiB with what lies outside it
THREADS = 8  # DuckDB asks for 125 MB of memory for each


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM end a query as KeyboardInterrupt; DuckDB turns what a handler raises into a RuntimeError."""
    received: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except RuntimeError as error:
        if received:
            raise KeyboardInterrupt(received[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection of bounded memory, which spills to a temporary folder in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".prepare_", suffix=".tmp", dir=folder))
    try:
        with _interruptible(), duckdb.connect() as con:
            threads = one_value(con, "SELECT current_setting('threads')")
            con.execute(f"SET threads = {min(threads, THREADS)}; SET memory_limit = '{MEMORY}'; SET TimeZone = 'UTC'")
            con.execute(f"SET temp_directory = {quote(scratch)}")
            yield con
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def one_value(con: duckdb.DuckDBPyConnection, query: str) -> Any:
    """The first value that a query returns; of a changed or created table, how many rows that were."""
    return con.execute(query).fetchone()[0]


@contextlib.contextmanager
def shown_progress(con: duckdb.DuckDBPyConnection, name: str) -> Iterator[None]:
    """Show in a terminal how far the queries in this block are, if they take over a second and DuckDB knows how far."""
    if not sys.stderr.isatty():
        yield
        return
    con.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")  # else DuckDB measures none
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(0.5):
            percent = con.query_progress()  # -1 where DuckDB knows no size, as of a pipe, which has a bar of its own
            if percent > bar.n:
                bar.update(percent - bar.n)

    with tqdm(desc=name, total=100, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}", delay=1) as bar:
        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        if bar.n:
            bar.update(100 - bar.n)
