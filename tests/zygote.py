"""Runs training scripts in forked children of one process that has imported everything, and kills them where it is asked to.

Importing torch and transformers takes longer than a whole run on tiny data; a fork has them at once. `Zygote` is the test's
side; `python -m tests.zygote` is the process, which reads one JSON order a line and writes the child's pid and then its status.
"""
import atexit
import collections
import errno
import functools
import importlib
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent


def environment(**more):
    """This process's, for one that takes one core and does not look for the hub."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def start(*command, prefix=(), **more):
    """Start Python with a script or module and its arguments, as a user does; stdout and stderr are one stream."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [*prefix, sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, env=environment(**{"PYTHONUNBUFFERED": "1", **more}), **pipes)


def read_until(process, text):
    """Read a started process's lines until one holds `text`."""
    if not any(text in line for line in process.stdout):
        raise AssertionError(f"the process ended without '{text}'")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@functools.cache
def shared_zygote():
    """The one zygote of a test session, started when it is first needed."""
    zygote = Zygote()
    atexit.register(zygote.close)
    return zygote


class Zygote:
    """The process that forks; close it at the end."""

    def __init__(self):
        command = [sys.executable, "-m", "tests.zygote"]
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=-1, stdout=-1, text=True)

    def close(self):
        self._process.stdin.close()
        self._process.wait()

    def _write(self, line):
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _order(self, arguments, script, kill_after=None, **order):
        """Order a run; returns how each of its processes ended."""
        self._write(json.dumps({"arguments": [str(part) for part in arguments], "script": script, **order}))
        child = json.loads(self._process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child["pid"], signal.SIGKILL)  # waited for only after the next line, so the pid is still the child's
        self._write("")
        return [SimpleNamespace(**end) for end in json.loads(self._process.stdout.readline())]

    def run_together(self, arguments, script="perpeft_lora_ia3", size=2, signal_at=None):
        """Run a script in several processes that train together, as a launcher would start them.

        Args:
            arguments, script: as of `run`.
            size: how many.
            signal_at: (rank, step): that process sends itself SIGTERM in the step so numbered since it began, from 1.
        Returns:
            for every process code, output and losses (of its steps, in order)
        """
        ends = self._order(arguments, script, size=size, port=free_port(), signal_at=signal_at)
        for end in ends:
            end.losses = [float(label.split()[-1]) for label in end.events if ": loss " in label]
        return ends

    def run(self, arguments, script="perpeft_lora_ia3", kill_at=None, kill_after=None, full_at=None):
        """Run a script in a child until it ends or is killed.

        Args:
            arguments: of the command line.
            script: the module whose main is run.
            kill_at: (part, number): the child kills itself at this event of this part of the run, counted from 1.
            kill_after: seconds after which it is killed.
            full_at: (part, number): the disk is full at this event.
        Returns:
            code (negative: the signal that ended it), output (stdout and stderr), events (labels, in order)
        """
        return self._order(arguments, script, kill_after, kill_at=kill_at, full_at=full_at)[0]


class Events:
    """Writes every event of a child into a file; at one of them it kills the process, or fails as if the disk were full.

    An event's label says in which part of the run it happens, as in "personalized/state: before replace .personalized.pt.tmp".
    """

    def __init__(self, file, kill_at, full_at):
        self._file = file
        self._kill_at, self._full_at = tuple(kill_at or ()), tuple(full_at or ())
        self._counts = collections.Counter()
        self._inside = ["opening"]

    def happen(self, what, half=lambda: None):
        """One event; `half` does half of the work, in case it does not get further."""
        part = "/".join(self._inside)
        self._counts[part] += 1
        os.write(self._file, f"{part}: {what}\n".encode())
        place = (part, self._counts[part])
        if place in (self._kill_at, self._full_at):
            half()
            if place == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def part(self, owner, name, label, alone=False):
        """Make a function a part of the run, named in the labels of the events inside it; its beginning is an event."""
        original = getattr(owner, name)

        def wrapped(*args, **options):
            before = self._inside
            self._inside = [label] if alone else [*before, label]
            try:
                self.happen("begins")
                return original(*args, **options)
            finally:
                self._inside = before

        setattr(owner, name, wrapped)

    def call(self, owner, name, detail=lambda *args: ""):
        """Make every call of a function two events, before it and after it."""
        original = getattr(owner, name)

        def wrapped(*args, **options):
            self.happen(f"before {name} {detail(*args)}".rstrip())
            result = original(*args, **options)
            self.happen(f"after {name} {detail(*args)}".rstrip())
            return result

        setattr(owner, name, wrapped)

    def save(self, owner, name):
        """Make every `torch.save` into a file an event during which half of it is written."""
        original = getattr(owner, name)

        def wrapped(value, file, *args, **options):
            def half():
                original(value, content := io.BytesIO())
                file.write(content.getvalue()[: len(content.getvalue()) // 2])
                file.flush()

            self.happen(f"during {name}", half)
            return original(value, file, *args, **options)

        setattr(owner, name, wrapped)

    def install(self):
        """Hook everything that can matter."""
        import shutil

        import torch

        from utils.items import store
        from utils.run import plots, reports
        from utils.run import run as run_module
        from utils.run.folder import RunFolder
        from utils.training import checkpoints
        from utils.training.evaluation import Evaluator
        from utils.training.trainer import Trainer

        def last_part(path, *args):
            return Path(os.fsdecode(path)).name if isinstance(path, (str, bytes, os.PathLike)) else ""

        for name in ("train_global", "group_users", "train_personalized", "report"):
            self.part(run_module.Run, name, name.replace("group_users", "grouping").removeprefix("train_"), alone=True)
        self.part(run_module.Run, "evaluate", "evaluation")
        self.part(checkpoints, "save_weights", "best weights")
        self.part(RunFolder, "clear", "clearing")
        self.part(checkpoints.Checkpoint, "save", "state")
        self.part(store.ImageTitleStore, "open", "store")
        for module, name in (
            (reports, "write_metrics"), (plots, "draw_curves"), (plots, "draw_groups"), (reports, "write_groups"),
            (run_module, "write_json"),
        ):  # fmt: skip
            self.part(module, name, name)
        self.call(store, "read_image", last_part)
        self.call(Evaluator, "item_table")
        self.call(run_module, "kmeans_groups")
        self.call(Trainer, "update")
        self.save(torch, "save")
        self.call(shutil, "rmtree", last_part)
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync", "posix_fallocate"):
            self.call(os, name, last_part)
            if hasattr(getattr(pathlib, "_NormalAccessor", None), name):  # through which Path calls os in Python 3.10
                setattr(pathlib._NormalAccessor, name, staticmethod(getattr(os, name)))


def write_instead_of_drawing(figure, path, **options):
    """In place of `Figure.savefig`, which takes more time than all the rest of a tiny run."""
    Path(path).write_bytes(b"drawn")


def _join(rank, order, hooks):
    """Make this process one of those that a launcher starts; every step's loss is an event, and one step may signal it."""
    from utils.common import console
    from utils.training.progress import Progress

    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["size"], "LOCAL_WORLD_SIZE": order["size"]}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": order["port"]}
    os.environ.update({name: str(value) for name, value in launched.items()})
    console.ERROR_GRACE_SECONDS = 0  # no launcher is there that would end the others
    original, steps = Progress.add, []

    def add(self, step, batch, loss):
        hooks.happen(f"loss {loss.item()!r}")
        steps.append(step)
        if [rank, len(steps)] == order["signal_at"]:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, step, batch, loss)

    Progress.add = add


def _child(order, events, output, rank):
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [f"{order['script']}.py", *order["arguments"]]
    hooks = Events(events, order.get("kill_at"), order.get("full_at"))
    hooks.install()
    if "size" in order:
        _join(rank, order, hooks)
    sys.modules["matplotlib.figure"].Figure.savefig = write_instead_of_drawing
    from utils.common.console import run_main

    code = 0
    try:
        run_main(importlib.import_module(order["script"]).main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not through the zygote's own ending


def _read_all(descriptor):
    os.lseek(descriptor, 0, os.SEEK_SET)
    with open(descriptor, "rb") as file:
        return file.read().decode()


def main():
    """Read orders until there are no more."""
    import torch

    torch.set_num_threads(1)
    # The last one is imported by the first optimizer that is made, and takes as long as a tiny run.
    for module in ("perpeft_lora_ia3", "perpeft_iisan", "matplotlib.backends.backend_agg", "matplotlib.figure", "torch._dynamo"):
        importlib.import_module(module)
    for line in sys.stdin:
        order = json.loads(line)
        children = []
        for rank in range(order.get("size", 1)):
            # Files without a name, inherited by the child: what it wrote before it was killed is kept.
            events, output = os.memfd_create("events"), os.memfd_create("output")
            pid = os.fork()
            if not pid:
                _child(order, events, output, rank)
            children.append((pid, events, output))
        print(json.dumps({"pid": children[0][0]}), flush=True)
        sys.stdin.readline()
        ends = []
        for pid, events, output in children:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            ends.append({"code": code, "output": _read_all(output), "events": _read_all(events).splitlines()})
        print(json.dumps(ends), flush=True)


if __name__ == "__main__":
    main()
