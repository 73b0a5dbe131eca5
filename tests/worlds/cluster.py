"""Processes of a gloo group that run functions by name and answer with what these return."""

import pickle
import traceback
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def _serve(rank, size, meeting, connection):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while (job := pickle.loads(connection.recv_bytes())) is not None:
        function, arguments, keywords = job
        try:
            answer = "done", function(*arguments, **keywords)
        except Exception as error:
            answer = "failed", (type(error).__name__, str(error), traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))  # copies: `send` would share the tensors' memory
    dist.destroy_process_group()


class Cluster:
    """`run(function, ...)` calls it in every process; a list of what they return, in the order of ranks."""

    def __init__(self, forks, size, folder):
        self.size = size
        self._lines, self._processes = [], []
        for rank in range(size):
            here, there = forks.Pipe()
            process = forks.Process(target=_serve, args=(rank, size, Path(folder) / "meeting", there), daemon=True)
            process.start()
            there.close()
            self._lines.append(here)
            self._processes.append(process)

    def outcomes(self, function, *arguments, **keywords):
        """(done, value) or (failed, (class, message, trace)) of each."""
        for line in self._lines:
            line.send_bytes(pickle.dumps((function, arguments, keywords)))
        return [pickle.loads(line.recv_bytes()) if line.poll(120) else ("silent", None) for line in self._lines]

    def run(self, function, *arguments, **keywords):
        outcomes = self.outcomes(function, *arguments, **keywords)
        for state, value in outcomes:
            if state != "done":
                raise AssertionError(f"{state}: {value[2] if value else 'no answer in two minutes'}")
        return [value for _, value in outcomes]

    def close(self):
        for line in self._lines:
            line.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()


@contextmanager
def cluster(forks, size, folder):
    group = Cluster(forks, size, folder)
    try:
        yield group
    finally:
        group.close()
