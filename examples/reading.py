"""How fast records come from where they are: python examples/reading.py DATASET [--batch-size 1024] [--batches 20] ...

Draws Poisson batches as `lipdp train` does and reads them, without a model: records a second, by number of workers.
With a model they are read while it computes, so what counts is whether this is more than the model takes.
"""

from __future__ import annotations

import argparse
import time

from lipdp.batches import BatchLoader, PoissonSampler
from lipdp.data import Augmented, augment, default_bounding, open_split

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("dataset")
parser.add_argument("--data-dir")
parser.add_argument("--batch-size", type=int, default=1024)
parser.add_argument("--batches", type=int, default=20)
parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--image-size", type=int, nargs=2)
parser.add_argument("--augment")
parser.add_argument("--views", type=int, default=1)
arguments = parser.parse_args()

split = open_split(arguments.dataset, data_dir=arguments.data_dir, image_size=arguments.image_size)
dataset = split.bounded(default_bounding(split)).training_dataset()
if arguments.augment:
    dataset = Augmented(dataset, augment(arguments.augment), views=arguments.views)
rate = min(1.0, arguments.batch_size / split.records)
for workers in arguments.workers:
    sampler = PoissonSampler(split.records, sampling_rate=rate, steps=arguments.batches + 1)
    batches = iter(BatchLoader(dataset, sampler, num_workers=workers))
    next(batches)  # the workers are there
    start, records = time.perf_counter(), 0
    for x, _ in batches:
        records += len(x)
    seconds = time.perf_counter() - start
    print(
        f"{workers} workers: {records / seconds:12,.0f} records/s, {1e3 * seconds / arguments.batches:8.1f} ms a batch"
    )
