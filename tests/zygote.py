"""Training scripts as processes of their own: started as a user starts them, or forked from one that has imported everything.

Importing torch and transformers takes longer than a whole run on tiny data; a fork has them at once.
"""
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from tests.moments import run_watched

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
# torch._dynamo is imported by the first optimizer that is made, and takes as long as a tiny run.
FORKS.set_forkserver_preload(["perpeft_lora_ia3", "perpeft_iisan", "torch._dynamo", "tests.moments"])


def start(*command, prefix=(), **environment):
    """Start Python with a script or module and its arguments, as a user does; stdout and stderr are one stream."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [*prefix, sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, **pipes)


def read_until(process, text):
    """Read a started process's lines until one holds `text`."""
    assert any(text in line for line in process.stdout), f"the process ended without '{text}'"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(arguments, script="perpeft_lora_ia3", size=None, kill_after=None, **moments):
    """Run a script in a fork until it ends or is killed, or in `size` forks that train together, as a launcher starts them.

    Args:
        arguments: of the command line.
        script: the module whose main is run.
        kill_after: seconds after which it is killed.
        moments: of `tests.moments.Moments`; and `interval`, the steps between two reads.
    Returns:
        of each fork, code (negative: the signal that ended it), output (stdout and stderr), events (labels, in order) and
        losses (of its steps)
    """
    launched = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environments = [{**launched, "RANK": rank, "LOCAL_RANK": rank} for rank in range(size)] if size else [{}]
    forks, ends = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, environment in enumerate(environments):
            output, events = Path(folder, f"output{number}"), Path(folder, f"events{number}")
            for path in (output, events):
                path.touch()  # for a fork that is killed before it writes
            order = (script, [str(part) for part in arguments], environment, output, events)
            forks.append((FORKS.Process(target=run_watched, args=order, kwargs=moments), output, events))
            forks[-1][0].start()
        for process, output, events in forks:
            process.join(kill_after)
            process.kill()
            process.join()
            labels = events.read_text().splitlines()
            losses = [float(label.split()[-1]) for label in labels if "before update" in label]
            ends.append(SimpleNamespace(code=process.exitcode, output=output.read_text(), events=labels, losses=losses))
    return ends
