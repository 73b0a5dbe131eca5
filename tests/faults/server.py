"""A process that has torch imported and forks one `lipdp` command per request, to be killed.

A request holds `arguments` of the command, and one of
    after: seconds after which the process gets SIGKILL;
    files: a pattern and a number: it gets SIGKILL, or the signal `send`, as soon as so many files that hold something
        match the pattern;
    at: number of the call, among those that write files, before which it sends itself SIGKILL (a write: after half).
The answer: `signal`, `code`, `seconds`, `output`, `errors` (its part on stderr), and `calls`: one letter for each of
of those calls that was made, `w`rite, `f`sync, `l`ink, `r`eplace or `u`nlink.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection

import torch

from lipdp.cli import main

CALLS = ("fsync", "replace", "link", "unlink")


class Counted:
    """Counts the calls that write files, and ends the process at one of them."""

    def __init__(self, at: int | None, count: int) -> None:
        self.at, self.counter = at, count
        self.made = 0

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self._before(getattr(os, name)))
        opened = tempfile.NamedTemporaryFile

        def named(*args, **options):
            stream = opened(*args, **options)
            stream.write = self._half(stream)
            return stream

        tempfile.NamedTemporaryFile = named

    def _is_the_one(self, letter: str) -> bool:
        os.pwrite(self.counter, letter.encode(), self.made)
        self.made += 1
        return self.made - 1 == self.at

    def _before(self, call):
        letter = call.__name__[0]

        def counted(*args, **options):
            if self._is_the_one(letter):
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return counted

    def _half(self, stream):
        write = stream.file.write

        def counted(content):
            if self._is_the_one("w"):
                write(bytes(content)[: len(content) // 2])
                stream.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return write(content)

        return counted


def child(request: dict, output: int, errors: int, counter: int) -> None:
    """Never returns."""
    code = 70
    try:
        os.dup2(output, 1)
        os.dup2(errors, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.environ.update(request.get("environment", {}))
        Counted(request.get("at"), counter).install()
        code = main(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def due(request: dict, seconds: float) -> bool:
    """Whether it is time for the signal."""
    if "files" in request:
        pattern, count = request["files"]
        return sum(os.path.getsize(name) > 0 for name in glob.glob(pattern)) >= count
    return seconds >= request.get("after", float("inf"))


def serve(request: dict) -> dict:
    with contextlib.ExitStack() as stack:
        output, errors, counter = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        began, waiting = time.monotonic(), True
        pid = os.fork()
        if pid == 0:
            child(request, output.fileno(), errors.fileno(), counter.fileno())
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            if waiting and due(request, time.monotonic() - began):
                os.kill(pid, request.get("send", signal.SIGKILL))
                waiting = False
            time.sleep(0.001)
        output.seek(0), errors.seek(0)
        said, complained = (stream.read().decode(errors="replace") for stream in (output, errors))
        return {
            "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "seconds": time.monotonic() - began,
            "calls": os.pread(counter.fileno(), 1 << 20, 0).decode(),
            "output": said + complained,
            "errors": complained,
        }


def warm_up() -> None:
    """One run in this process, so that all that is imported late is imported before the forks."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        quick = [
            "--model", "linear", "--steps", "1", "--batch-size", "9", "--noise-multiplier", "9", "--optimizer", "adam",
        ]  # fmt: skip
        main(["train", *quick, "--accountant", "rdp", "--threads", "1", "--out", f"{folder}/run"])


def answer(line: Connection) -> None:
    """Serve the requests of a connection until there is a None."""
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", COLUMNS="80", NO_COLOR="1")
    warm_up()
    while (request := line.recv()) is not None:
        line.send(serve(request))
