"""The prepared check on a GPU runs whole on a CPU, ends parts that are late, and writes what it has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("opacus")
ROOT = Path(__file__).parents[1]
PARTS = ("machine", "tests", "noise", "views", "forward", "speed", "largest", "train")

pytestmark = pytest.mark.slow


def checked(out, *options):
    """What it wrote, in both forms."""
    command = [sys.executable, "examples/gpu.py", "--device", "cpu", "--quick", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIPDP_DATA": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2000)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "gpu.json").read_text())["parts"], (out / "gpu.md").read_text()


def test_every_part_runs_on_a_cpu(tmp_path):
    parts, page = checked(tmp_path, "--minutes", "30")  # as many as a loaded machine may take
    assert tuple(parts) == PARTS
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(PARTS, "done"), page
    rows = {name: part["rows"] for name, part in parts.items()}
    assert len(rows["tests"]) > 10
    assert {row["outcome"] for row in rows["tests"]} <= {"skipped", "passed"}
    assert all(row.get("passed", True) for row in rows["noise"])
    assert {row["views"] for row in rows["views"]} == {1, 3}
    ways = ["as written", "channels last", "bf16", "compiled", "together"]
    assert [row["way"] for row in rows["forward"]] == ways
    assert {row["status"] for row in rows["speed"]} == {"measured"}
    assert {row["batch_size"] for row in rows["speed"]} == {4, 8}
    assert all(row["largest"] == 8 for row in rows["largest"])
    assert [row["exit code"] for row in rows["train"]] == [0, 0]
    assert all(0 < row["epsilon"] <= row["target"] for row in rows["train"])
    assert all(f"## {name}: done" in page for name in PARTS)


def test_a_part_whose_time_is_over_is_ended_and_said_to_be(tmp_path):
    parts, page = checked(tmp_path, "--only", "noise", "forward", "--minutes", "0.01")
    assert {part["status"] for part in parts.values()} == {"out of time"}
    assert "## forward: out of time" in page


def test_a_part_that_fails_says_why_and_the_next_one_runs(tmp_path):
    parts, _ = checked(tmp_path, "--only", "train", "machine", "--minutes", "10", "--train", "--model nosuch")
    assert parts["machine"]["status"] == "done"
    assert [row["exit code"] for row in parts["train"]["rows"]] == [2, 2]
