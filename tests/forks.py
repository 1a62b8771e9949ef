"""Functions run in a copy of this process, so that one that fills the memory or never ends is a failed test."""
import multiprocessing
import resource
import signal
import tempfile
from pathlib import Path


def in_a_fork(function, addresses=2**30):
    """Call `function(write)` in a copy of this process with little more memory; return what it wrote and the exit code."""

    def limited():
        before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (before + addresses, before + addresses))
        signal.alarm(60)
        function(lambda *words: print(*words, file=written))

    with tempfile.TemporaryFile("w+", buffering=1, encoding="utf-8") as written:  # line by line, also if the copy is killed
        copy = multiprocessing.get_context("fork").Process(target=limited)
        copy.start()
        copy.join()
        written.seek(0)
        return written.read(), copy.exitcode
