"""torchrun's agent, over workers that are forked from a process that has imported torch."""

import multiprocessing
import os
import sys
from pathlib import Path

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lipdp.cli import main


def _worker(folder, arguments):
    (Path(folder) / f"worker-{os.environ['RANK']}").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    if code := main(arguments):
        sys.exit(code)


def launch(folder, arguments, *, size=2, restarts=0):
    """As `torchrun -m lipdp ARGUMENTS`; every worker leaves its process id in `folder`."""
    used = ["lipdp.cli", "lipdp.commands.display", "lipdp.training.trainer", "torch._dynamo"]
    multiprocessing.set_forkserver_preload(used)
    config = LaunchConfig(
        1, 1, size, run_id="lipdp", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=restarts,
        monitor_interval=0.2, start_method="forkserver",
    )  # fmt: skip
    elastic_launch(config, _worker)(str(folder), [str(a) for a in arguments])
