"""What a GPU can show of lipdp, in one go: python examples/gpu.py --out DIR [--data-dir DIR] [--skip PART …]

Each part runs in a process of its own with a share of the time, and is ended when that is over; DIR/gpu.json and
DIR/gpu.md hold what there is after every part, also of a part that failed or was ended. `--only` and `--skip` choose
parts: machine, tests, noise, views, forward, speed, largest, train.

`train` reads CIFAR-10 (cifar-10-batches-py) from --data-dir and is skipped without. On a machine that has torch and not
lipdp: put what `wheels.sh` fetches and the checkout on PYTHONPATH, `ln -sfn ../models lipdp/models`, and go.

`--device cpu --quick` runs all of it small on a CPU: to test this script, not to measure.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, QUICK, Late, Row, Run, Size

from lipdp.comparison.results import Results, markdown
from lipdp.comparison.speed import table
from lipdp.files import write_bytes, write_json

CONTEXT = multiprocessing.get_context("forkserver")  # its server imports once, and never touches the GPU
GRACE = 4.0  # seconds between asking a part to end and ending it


def work(name: str, run: Run) -> None:
    """A part, in a process of its own: rows to NAME.jsonl as they come, what it prints to NAME.log."""
    os.setsid()  # so that it can be ended with its children
    log = os.open(run.scratch / f"{name}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    with (run.scratch / f"{name}.jsonl").open("w") as rows:

        def emit(row: Row) -> None:
            rows.write(json.dumps(row) + "\n")
            rows.flush()

        try:
            PARTS[name][0](run, emit)
        except Late:
            sys.exit(3)
        except Exception:
            traceback.print_exc()
            sys.exit(1)


def finished(name: str, run: Run) -> Row:
    """The part's outcome, once it is over or its time is."""
    begin = time.time()
    process = CONTEXT.Process(target=work, args=(name, run))
    process.start()
    process.join(max(run.end + GRACE - time.time(), 0.0))
    late = process.is_alive()
    if late:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    status = "out of time" if late else {0: "done", 3: "out of time"}.get(process.exitcode, "failed")
    files = {kind: run.scratch / f"{name}.{kind}" for kind in ("jsonl", "log")}
    rows, log = (path.read_text(errors="replace") if path.exists() else "" for path in files.values())
    found = [json.loads(line) for line in rows.splitlines(keepends=True) if line.endswith("\n")]
    outcome = {"status": status, "seconds": round(time.time() - begin, 1), "rows": found}
    return outcome if status == "done" else {**outcome, "log": log[-2000:]}


def tabulated(rows: list[Row]) -> str:
    """Cells of `lipdp compare speed` as it shows them, a table a data set; all else a row a row."""
    if "step_seconds" in str(rows) and "trainer" in rows[0]:
        tables = []
        for dataset in dict.fromkeys(row["dataset"] for row in rows):
            results = Results(None, config={})
            results.cells = [row for row in rows if row["dataset"] == dataset]
            reasons = {f"{row['trainer']}, {row['model']}: {row['reason']}" for row in results.cells if "reason" in row}
            tables.append("\n\n".join([f"{dataset} (step time, × non-private, peak memory)", table(results), *reasons]))
        return "\n\n".join(tables)
    header = list(dict.fromkeys(name for row in rows for name in row))
    shown = ([_text(row.get(name, "")) for name in header] for row in rows)
    return markdown(header, shown) if rows else "nothing"


def _text(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "¦").split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=7.8)
    parser.add_argument("--data-dir", default=os.environ.get("LIPDP_DATA"))
    parser.add_argument("--train", default="", help="further options of lipdp train, in one string")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--skip", nargs="+", choices=PARTS, default=[])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in PARTS if name in args.only and name not in args.skip]
    weights = {name: 1.0 if args.quick else PARTS[name][1] for name in names}  # small parts take alike
    end = time.time() + 60 * args.minutes
    found: dict[str, Row] = {}
    CONTEXT.set_forkserver_preload(["lipdp.comparison.speed", "lipdp.training", "lipdp.commands.train", "pytest"])
    server = CONTEXT.Process(target=os.getpid)  # no part's time
    server.start()
    server.join()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        for number, name in enumerate(names):
            share = weights[name] / sum(weights[other] for other in names[number:])
            stop = time.time() + share * (end - time.time()) - GRACE
            size = QUICK if args.quick else Size()
            train = (*size.train, *shlex.split(args.train))
            found[name] = finished(name, Run(size, args.device, args.data_dir or None, Path(scratch), stop, train))
            write_json(args.out / "gpu.json", {"arguments": vars(args) | {"out": str(args.out)}, "parts": found})
            pages = [f"## {n}: {p['status']}, {p['seconds']} s\n\n{tabulated(p['rows'])}\n" for n, p in found.items()]
            write_bytes(args.out / "gpu.md", "\n".join(pages).encode())
            print(pages[-1], found[name].get("log", ""), flush=True)


if __name__ == "__main__":
    main()
