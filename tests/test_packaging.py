"""What is packed: a source archive that runs its own tests, one citation, and extras that exist and are said alike."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import lipdp

ROOT = Path(__file__).parents[1]
PACKED_ANYWAY = {"lipdp", "models", "README.md", "LICENSE", "pyproject.toml", "MANIFEST.in"}
LEFT_OUT = {".gitignore"}


def test_the_manifest_names_all_that_the_tests_read():
    manifest = (ROOT / "MANIFEST.in").read_text().split()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.splitlines()}
    assert top - PACKED_ANYWAY - LEFT_OUT <= set(manifest)


PYTHONS = {"3.10": ("torch==2.4.1", "numpy==1.26.4"), "3.13": ()}
"""The oldest and the newest, and what is installed first there."""

CORE = ("rooms", "accounting", "bounds", "layers", "readme")


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_the_core_runs_on_the_oldest_and_the_newest_python(version, tmp_path):
    known = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    python = known[-1] if known else shutil.which(f"python{version}")
    if python is None:
        pytest.skip(f"there is no Python {version}")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".git", "*.egg-info", "runs"))
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    its = str(tmp_path / "venv" / "bin" / "python")
    install = [its, "-m", "pip", "install", "--quiet", *PYTHONS[version], "-e", str(source), "pytest", "hypothesis"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"not installable: {done.stderr.strip().splitlines()[-1]}")
    files = [f"tests/test_{name}.py" for name in CORE]
    command = [its, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.slow
def test_a_source_archive_holds_every_file_and_its_tests_run(tmp_path):
    pytest.importorskip("setuptools")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".git", "*.egg-info", "runs"))
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
    with tarfile.open(tmp_path / f"lipdp-{lipdp.__version__}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"lipdp-{lipdp.__version__}"
    files = {p.relative_to(ROOT) for folder in ("tests", "docs", "examples") for p in (ROOT / folder).rglob("*.*")}
    assert not [p for p in files if "__pycache__" not in p.parts and not (unpacked / p).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_rooms.py"]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_citation_has_the_version():
    assert f"\nversion: {lipdp.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_extras_exist_and_are_said_alike():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = "\n".join(path.read_text() for path in (ROOT / "lipdp").rglob("*") if path.suffix in (".py", ".jinja"))
    said = re.findall(r"pip install (\S+?\])(.)", texts)
    assert said
    for name, after in said:
        extra = re.fullmatch(r'"lipdp\[(\w+)\]', name)
        assert extra, name
        assert extra.group(1) in extras
        assert after == '"'
