"""What it costs to draw a Poisson batch: time a step and the most memory, by the number of records. Prints a table.

    python examples/sampler.py [--records 10000 1000000 1000000000] [--batch-size 4096] [--steps 50]

One coin per record, the definition, is timed beside it up to ten million records.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np

from lipdp.batches import PoissonSampler

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--records", type=int, nargs="+", default=[10**4, 10**6, 10**9])
parser.add_argument("--batch-size", type=int, default=4096)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--secure-up-to", type=int, default=10**9, help="records")
arguments = parser.parse_args()


def coins(records: int, rate: float) -> Iterator[np.ndarray]:
    generator = np.random.default_rng()
    while True:
        yield np.flatnonzero(generator.random(records) < rate)


def measured(draw: Callable[[], Iterator[object]], steps: int) -> str:
    """Median seconds a step, and the peak of a step of its own that is traced."""
    batches, seconds = draw(), []
    for _ in range(steps):
        start = time.perf_counter()
        next(batches)
        seconds.append(time.perf_counter() - start)
    tracemalloc.start()
    next(batches)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return f"{statistics.median(seconds) * 1e3:12,.3f} ms {peak / 2**20:10.2f} MiB"


print(f"{'N':>14} {'sampler':>8} {'a step':>15} {'peak':>14}")
for records in arguments.records:
    rate = arguments.batch_size / records
    for secure in (False, True):
        steps = arguments.steps if not secure or records < 10**8 else 3
        if secure and records > arguments.secure_up_to:
            continue
        sampler = PoissonSampler(records, sampling_rate=rate, steps=steps + 1, secure=secure)
        found = measured(sampler.__iter__, steps)
        print(f"{records:>14,} {'secure' if secure else 'default':>8} {found}", flush=True)
    if records <= 10**7:
        found = measured(lambda records=records, rate=rate: coins(records, rate), arguments.steps)
        print(f"{records:>14,} {'coins':>8} {found}", flush=True)
