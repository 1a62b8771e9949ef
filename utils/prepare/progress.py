"""A progress bar for a query of DuckDB."""

import contextlib
import sys
import threading
from collections.abc import Iterator

import duckdb
from tqdm import tqdm


@contextlib.contextmanager
def shown_progress(con: duckdb.DuckDBPyConnection, name: str) -> Iterator[None]:
    """Show in a terminal how far the queries in this block are, if they take over a second and DuckDB knows how far."""
    if not sys.stderr.isatty():
        yield
        return
    con.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")  # else DuckDB measures none
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(0.5):
            percent = con.query_progress()  # -1 where DuckDB knows no size, as of a pipe, which has a bar of its own
            if percent > bar.n:
                bar.update(percent - bar.n)

    with tqdm(desc=name, total=100, bar_format=form, delay=1) as bar:
        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        if bar.n:
            bar.update(100 - bar.n)
