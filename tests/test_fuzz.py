"""Bad input, by the thousand: each ends in success or in one readable message of the library, never in a traceback.

Every sweep runs with few cases by default and with many under `-m slow`. The default run tries the same every time.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import pickle
import shutil
import signal
import zipfile
from fractions import Fraction
from functools import partial
from typing import get_type_hints

import numpy as np
import pytest
import torch
import typer
from data_files import PYTHON2_BATCH
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit import Raises

import lipdp
from lipdp import cli
from lipdp.batches.samplers import FixedSizeSampler, PoissonSampler
from lipdp.errors import LipdpError
from lipdp.training import Interrupted, Trainer, configure

pytestmark = pytest.mark.usefixtures("one_thread")
PATIENCE = 60  # seconds for one case


def sweep(few, many):
    """A test that runs with few cases, and with many under `-m slow`."""
    return pytest.mark.parametrize("cases", [few, pytest.param(many, marks=pytest.mark.slow)])


def tried(cases, strategy, check):
    """Put `cases` examples of the strategy to the check."""
    profile = settings(
        max_examples=cases,
        deadline=None,
        derandomize=cases < 1000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    profile(given(strategy)(check))()


class TooLong(BaseException):
    """A case that does not end is a failure, and nothing may catch it."""


@contextlib.contextmanager
def patience():
    def ring(number, frame):
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- the command ------------------------------------------------------------------------------------------------------

NUMBERS = [
    "nan", "inf", "-inf", "-1", "0", "1", "2", "3", "0.5", "-0.0", "1e-9", "1e-320", "1e9", "1e400", "1_0", "0x10",
    "٣",
]  # fmt: skip
TEXTS = [
    "", " ", "None", "true", "[]", "{}", "[" * 5000, "(1,", "a" * 5000, "é\n", "\udcff", "[/bold]", "--", "=", "x=",
    "=1", "*",
]  # fmt: skip
NAMES = [
    "digits", "mnist", "adbench/", "adbench/../x", "no.npz", "/", ".", "/dev/null", "x.csv", "cnn", "mlp", "os:getcwd",
    "os:", ":", "json:loads", "torch.nn:Linear", "..:x", "poisson", "fixed_size", "global", "min_variance", "off",
    "prv", "pld", "rdp", "sgd", "adam", "cosine", "linear", "hinge", "bce", "hkr", "dct", "clip", "tanh", "signed-log",
    "meta", "rescale", "standardise", "cuda", "cuda:99", "cpu:7", "mps", "scattering",
]  # fmt: skip
PAIRS = [
    "width=0", "width=3", "depth=1", "depth=-1", "width=1e99", "depth=[]", "tau=nan", "tau=-1", "margin=inf",
    "alpha=2", "priors=[1,2]", "priors=x", "keep=0", "keep=99", "J=9", "unit_norm=3", "dtype=int8", "group_norm=2",
    "eps=0", "upper=-1", "lower=nan", "scale=0", "mean=[1,2]", "std=x", "std=1e-320", "input_bound=0",
    "input_bound=1e-30", "gates=[null]", "clips=1e308", "gates=-1", "bias=1", "twin=true", "kind=5", "width=true",
    "input_shape=3", "layers=1", "num_classes=2",
]  # fmt: skip
ENOUGH = {  # what makes the command quick where the case does not say otherwise
    "train": {
        "--model": "linear", "--steps": "2", "--batch-size": "64", "--noise-multiplier": "2", "--accountant": "rdp",
    },
    "sensitivity": {"--model": "linear", "--input-shape": "6"},
    "epsilon": {"--noise-multiplier": "2", "--sampling-rate": "0.1", "--steps": "20"},
    "calibrate": {"--epsilon": "2", "--sampling-rate": "0.1", "--steps": "20"},
}  # fmt: skip
_COMMANDS = {name: one.callback for name, one in typer.main.get_command(cli.app).commands.items()}
_NOT_TRIED = ("download", "resume")  # the network; another sweep
OPTIONS = {  # name → [(option, its type)]
    name: [
        ("--json" if option == "as_json" else f"--{option.replace('_', '-')}", hint)
        for option, hint in get_type_hints(_COMMANDS[name]).items()
        if option not in (*_NOT_TRIED, "return")
    ]
    for name in ENOUGH
}
WORDS = st.sampled_from([*NUMBERS, *TEXTS, *NAMES, *PAIRS]) | st.text(max_size=6).filter(lambda text: "\0" not in text)
NUMERIC = st.sampled_from(NUMBERS) | st.floats().map(str) | st.integers().map(str)


@st.composite
def command_lines(draw):
    """A command, its quick settings, and up to four options with values that may be anything."""
    name = draw(st.sampled_from(sorted(ENOUGH)))
    options = dict(ENOUGH[name])
    more = []
    for flag, hint in draw(st.lists(st.sampled_from(OPTIONS[name]), min_size=1, max_size=4)):
        if hint is bool:
            more.append(flag)
            continue
        numeric = hint in (int, float, int | None, float | None)
        values = (
            NUMERIC if numeric and draw(st.integers(0, 4)) else st.sampled_from(PAIRS) if "option" in flag else WORDS
        )
        if draw(st.booleans()):
            options.pop(flag, None)
        else:
            options[flag] = draw(values)
    if draw(st.integers(0, 9)) == 0:
        more.append(draw(WORDS))
    return name, [*(word for pair in options.items() for word in pair), *more]


@pytest.fixture
def two_steps(monkeypatch):
    """Runs are interrupted after two steps, however many they were asked for."""
    take_step = Trainer._take_step

    def limited(self, pieces):
        take_step(self, pieces)
        if self.step >= 2 and self.step < self.total_steps:
            raise Interrupted("that is enough")

    monkeypatch.setattr(Trainer, "_take_step", limited)


def outcome(arguments):
    """Exit code and what was printed."""
    out, err = io.StringIO(), io.StringIO()
    threads = torch.get_num_threads()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), patience():
            code = cli.main(arguments)
    finally:
        torch.set_num_threads(threads)
    return code, out.getvalue(), err.getvalue()


def assert_readable(code, err):
    """Done, interrupted by the test, or refused in a message that is not a dump."""
    assert code in (0, 2, 130), (code, err)
    if code == 2:
        assert "rror" in err, err
        assert "Traceback" not in err
        assert len(err) < 30_000


def assert_whole(folder):
    """A folder that a run was refused in is not there, or holds a run that can be resumed."""
    if folder.exists():
        names = {path.name for path in folder.rglob("*")}
        assert not names or names >= {"config.json", "privacy.json", "checkpoint.pt"}, names
        assert not any(name.endswith(".tmp") for name in names)


@sweep(20, 3000)
def test_the_command_line(cases, tmp_path, monkeypatch, two_steps):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIPDP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    codes = []

    def check(case):
        name, words = case
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        try:
            out = ["--out", str(tmp_path / "work" / "run")] if name == "train" and "--out" not in words else []
            code, _, err = outcome([name, *words, *out])
            codes.append(code)
            assert_readable(code, err)
            if code == 2 and out:
                assert_whole(tmp_path / "work" / "run")
        finally:
            monkeypatch.chdir(tmp_path)
            shutil.rmtree(tmp_path / "work")

    tried(cases, command_lines(), check)
    assert {0, 2} <= set(codes)
    print(f"{len(codes)} command lines: { {code: codes.count(code) for code in set(codes)} }")


# --- the folder of a run ----------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*TEXTS[:8], *NAMES, *NUMBERS, 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["", "width", "tau", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run that ended after two of three steps."""
    folder = tmp_path_factory.mktemp("unfinished") / "run"
    quick = {"model": "linear", "batch_size": 64, "steps": 3, "noise_multiplier": 2.0, "accountant": "rdp", "seed": 0}
    with pytest.raises(RuntimeError, match="gone"):
        Trainer(
            configure(**quick, checkpoint_every=1, log_every=1), out=folder, monitor=Raises(2, RuntimeError("gone"))
        ).run()
    return folder


@st.composite
def edits(draw):
    """One of the files, and a function that changes its value or its bytes."""
    name = draw(st.sampled_from(["config.json", "config.json", "privacy.json", "metrics.jsonl"]))
    if draw(st.integers(0, 3)) == 0:
        return name, draw(damage())
    place, value, how = draw(st.integers(0, 99)), draw(JSON), draw(st.sampled_from(["replace", "delete", "add", "all"]))

    def edit(content):
        if how == "all":
            return json.dumps(value).encode()
        lines = content.decode().splitlines() if name == "metrics.jsonl" else [content.decode()]
        plain = json.loads(lines[-1])
        key = sorted(plain)[place % len(plain)]
        if how == "delete":
            del plain[key]
        else:
            plain[key if how == "replace" else f"{key}_"] = value
        return "\n".join([*lines[:-1], json.dumps(plain)]).encode()

    return name, edit


@st.composite
def damage(draw):
    """A function that truncates, flips, repeats, overwrites or extends bytes."""
    cut = draw(st.none() | st.floats(0, 1))
    flips = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255), st.booleans()), max_size=5))
    tail = draw(st.sampled_from([b"", b"\0", b"\n", b"[" * 100_000]) | st.binary(max_size=8))

    def apply(content):
        damaged = bytearray(content if cut is None else content[: int(cut * len(content))])
        for place, value, early in flips:
            if damaged:
                damaged[int(place * (min(len(damaged), 300 if early else len(damaged)) - 1))] ^= value
        return bytes(damaged) + tail

    return apply


@sweep(12, 1500)
def test_the_files_of_a_run(cases, unfinished, tmp_path):
    codes = []

    def check(case):
        name, edit = case
        folder = shutil.copytree(unfinished, tmp_path / "run")
        try:
            path = folder / name
            path.write_bytes(edit(path.read_bytes()))
            before = {p.name: p.read_bytes() for p in folder.iterdir()}
            code, _, err = outcome(["train", "--resume", str(folder)])
            codes.append(code)
            assert_readable(code, err)
            if code == 2:
                assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
            else:
                assert json.loads((folder / "privacy.json").read_text())["steps"] == 3
        finally:
            shutil.rmtree(folder)

    tried(cases, edits(), check)
    assert {0, 2} <= set(codes)


@st.composite
def changed_checkpoints(draw):
    """A function that replaces, or takes out, one of the values in a nested checkpoint."""
    path = draw(st.lists(st.integers(0, 50), min_size=1, max_size=6))
    value = draw(
        JSON | st.sampled_from([torch.zeros(2), torch.tensor(float("nan")), torch.zeros(0, dtype=torch.int64), -1, 7])
    )
    delete = draw(st.integers(0, 3)) == 0

    def change(node, places=tuple(path)):
        if not isinstance(node, (dict, list)) or not node:
            return value
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[places[0] % len(keys)]
        copy = dict(node) if isinstance(node, dict) else list(node)
        if len(places) > 1:
            copy[key] = change(node[key], places[1:])
        elif delete:
            del copy[key]
        else:
            copy[key] = value
        return copy

    return change


@sweep(12, 2500)
def test_checkpoints_that_hold_something_else(cases, unfinished, tmp_path):
    good = torch.load(unfinished / "checkpoint.pt", weights_only=True)

    def check(change):
        folder = shutil.copytree(unfinished, tmp_path / "run")
        try:
            torch.save(change(good), folder / "checkpoint.pt")
            before = {p.name: p.read_bytes() for p in folder.iterdir()}
            code, _, err = outcome(["train", "--resume", str(folder)])
            assert_readable(code, err)
            if code == 2 and "is finished" not in err:
                left = {p.name: p.read_bytes() for p in folder.iterdir()}
                assert left == before or json.loads(left["privacy.json"])["steps"] >= 1  # a step that then failed
        finally:
            shutil.rmtree(folder)

    tried(cases, changed_checkpoints(), check)


# --- data files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small and valid files of every format: name → bytes, in a layout that `load` reads."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    pixels, digits = rng.integers(0, 256, (3, 28, 28), dtype=np.uint8), np.array([1, 0, 9], np.uint8)
    lipdp.data.files.write_idx(folder / "images", pixels)
    lipdp.data.files.write_idx(folder / "labels", digits)
    cifar = {b"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8), b"labels": [3, 4]}
    arrays = {"X": rng.normal(size=(6, 3)), "y": np.arange(6) % 2}
    np.savez(folder / "plain.npz", **arrays)
    np.savez_compressed(folder / "zipped.npz", **arrays, X_test=arrays["X"][:2], y_test=arrays["y"][:2])
    images, labels = (folder / "images").read_bytes(), (folder / "labels").read_bytes()
    return {
        "images": images, "labels": labels, "images.gz": gzip.compress(images), "labels.gz": gzip.compress(labels),
        **{f"cifar{p}": pickle.dumps(cifar, p) for p in range(6)}, "cifar of Python 2": PYTHON2_BATCH,
        "plain.npz": (folder / "plain.npz").read_bytes(), "zipped.npz": (folder / "zipped.npz").read_bytes(),
    }  # fmt: skip


def read_changed(files, kind, content, folder):
    """Put the file where `load` finds it, beside valid ones, and load the set."""
    if kind.endswith(".npz"):
        (folder / kind).write_bytes(content)
        return lipdp.data.load(str(folder / kind))
    if kind.startswith("cifar"):
        batches = folder / "cifar-10-batches-py"
        batches.mkdir()
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            (batches / name).write_bytes(content if name == "data_batch_3" else files["cifar4"])
        return lipdp.data.load("cifar10", data_dir=folder)
    for part in ("train", "t10k"):
        for name, place in (("images", "images-idx3-ubyte"), ("labels", "labels-idx1-ubyte")):
            changed = part == "train" and kind.split(".")[0] == name
            suffix = ".gz" if changed and kind.endswith(".gz") else ""
            (folder / f"{part}-{place}{suffix}").write_bytes(content if changed else files[name])
    return lipdp.data.load("mnist", data_dir=folder)


@st.composite
def pickles(draw):
    """Programs of the pickle machine: its opcodes in any order, with arguments that a reader must not call."""
    words = [
        b"cos\nsystem\n",
        b"cnumpy\nndarray\n",
        b"cnumpy\ndtype\n",
        b"cnumpy.core.multiarray\n_reconstruct\n",
        b"U\x01b",
    ]
    words += [
        b"cbuiltins\neval\n",
        b"c_codecs\nencode\n",
        b"cnumpy.core.numeric\n_frombuffer\n",
        b"X\x04\x00\x00\x00data",
    ]
    words += [
        b"X\x06\x00\x00\x00labels", b"q\x01", b"h\x01", b"K\x00", b"M\x00\x0c", b"C\x03abc",
        b"X\x06\x00\x00\x00latin1",
    ]  # fmt: skip
    opcodes = [bytes([code]) for code in b"()}]{tldsaeuRbo0123\x85\x86\x87\x88\x89\x81\x90\x91\x92\x93\x94N"]
    body = draw(st.lists(st.sampled_from(words + opcodes), max_size=30))
    return b"\x80\x04" + b"".join(body) + draw(st.sampled_from([b".", b"", b"}."]))


@st.composite
def archives(draw):
    """Zip files with npy members of any header and body."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", draw(st.sampled_from([0, 8, 12]))) as archive:
        for key in draw(st.lists(st.sampled_from(["X", "y", "X_test", "y_test", "../X"]), unique=True, max_size=4)):
            dtype = draw(
                st.sampled_from(["<f8", "|u1", "<i4", "|O", "<c16", "|S3", "<f2", "<U2", "|b1", ">f8", "x", "|V8"])
            )
            shape = draw(st.lists(st.sampled_from([0, 1, 2, 6, -1, 2**63, 10**20]), max_size=4))
            fields = {"descr": dtype, "fortran_order": draw(st.booleans()), "shape": tuple(shape)}
            header = (repr(fields) + draw(st.sampled_from(["\n", "", "+" * 9, "}" * 3]))).encode()
            magic = b"\x93NUMPY" + draw(st.sampled_from([b"\1\0", b"\2\0", b"\3\0", b"\xff\xff"]))
            size = len(header).to_bytes(2 if magic[6] == 1 else 4, "little")
            archive.writestr(f"{key}.npy", magic + size + header + draw(st.binary(max_size=64)))
    return stream.getvalue()


@st.composite
def data_files(draw):
    """A format, and what becomes of a valid file of it."""
    kinds = ["images", "labels", "images.gz", "labels.gz", *(f"cifar{p}" for p in range(6)), "plain.npz", "zipped.npz"]
    kind = draw(st.sampled_from([*kinds, "cifar of Python 2"]))
    made = {"c": pickles(), "p": archives(), "z": archives()}.get(kind[0])
    if made is not None and draw(st.booleans()):
        content = draw(made)
        return kind, lambda good: content
    if kind.endswith(".gz") and draw(st.booleans()):
        inner = draw(damage())
        return kind, lambda good: gzip.compress(inner(gzip.decompress(good)))
    return kind, draw(damage())


@sweep(120, 6000)
def test_data_files(cases, files, tmp_path):
    loaded = []

    def check(case):
        kind, change = case
        folder = tmp_path / "data"
        folder.mkdir()
        try:
            with patience():
                split = read_changed(files, kind, change(files[kind]), folder)
        except LipdpError as error:
            message = str(error)
        else:
            message = str(folder)
            loaded.append(kind)
            for x, y in ((split.train_x, split.train_y), (split.test_x, split.test_y)):
                assert x.isfinite().all()
                assert len(x) == len(y) > 0
                assert set(y.tolist()) <= set(range(split.num_classes))
        finally:
            shutil.rmtree(folder)
        assert str(folder) in message
        assert len(message) < 3000

    tried(cases, data_files(), check)
    assert loaded


# --- arguments of the library -----------------------------------------------------------------------------------------

GARBAGE = [
    None, True, False, -1, 0, 1, 2, 3, 7, 2**63, 10**30, -(10**400), 0.5, -0.0, 1e-320, 1e308, math.nan, math.inf,
    -math.inf, Fraction(1, 3), np.float32(0.3), np.int64(3), np.float64("inf"), "", "a", "1", "nan", "\0", "\udcff",
    "global", "prv", [], [1], [None], [-1], (), (1, 2), (4,), (1, 4, 4), (10**30,), {}, {"a": 1},
]  # fmt: skip
"""In the place of a name, a number, a shape or options. What takes tensors and modules is left to torch to refuse."""


def small_model():
    return torch.nn.Sequential(lipdp.nn.InputBound(1.0), lipdp.nn.SpectralLinear(4, 3))


def small_data():
    return torch.utils.data.TensorDataset(torch.zeros(12, 4), torch.arange(12) % 3)


def made_private(**given):
    """An engine's one step with these arguments."""
    accountant, seed = given.pop("accountant"), given.pop("seed")
    engine = lipdp.PrivacyEngine(accountant, seed=seed)
    module = given.pop("module")
    given.setdefault(
        "optimizer", torch.optim.SGD(small_model().parameters() if module is None else module.parameters(), 0.1)
    )
    make = engine.make_private if "noise_multiplier" in given else engine.make_private_with_epsilon
    return make(module=module, **given)


def model_of(**given):
    model = lipdp.models.build(**given)
    return model(torch.zeros(2, *given["input_shape"]))


def layer(kind):
    return getattr(lipdp.nn, kind)


def loss(make):
    def call(*, logits, target, **given):
        return make(**given)(logits, target).sum()

    return call


def project(kind):
    def call(*, matrix, **given):
        constraint = getattr(lipdp.constraints, kind)(**given)
        return constraint.norm_bound(constraint.project(matrix)), constraint.contains(matrix)

    return call


def arguments_of_the_library():
    """Name → (function, arguments that are right); one or two of them are then replaced."""
    x, logits = torch.zeros(2, 4), torch.zeros(2, 3)
    scored = {"logits": logits, "target": torch.tensor([0, 2])}
    plan = {"sampling_rate": 0.1, "steps": 5, "delta": 1e-5, "accountant": "rdp", "relation": "add_or_remove_one"}
    split = lipdp.data.load("digits")
    engine = {
        "dataset": small_data(), "criterion": lipdp.losses.TauCrossEntropy(2.0), "expected_batch_size": 4, "steps": 3,
        "allocation": "per_layer", "sampling": "poisson", "gate": 0.3, "dataset_size": 12, "input_shape": (4,),
        "forward_dtype": None, "num_workers": 0, "accountant": "rdp", "seed": 0,
    }  # fmt: skip
    calls = {
        "epsilon": (lipdp.epsilon, {**plan, "noise_multiplier": 2.0}),
        "calibrate": (lipdp.calibrate, {**plan, "target_epsilon": 2.0}),
        "build": (model_of, {"name": "mlp", "input_shape": (1, 4, 4), "num_classes": 3, "input_bound": 2.0,
                             "clips": None, "gates": None, "bias": False, "twin": False, "width": 8, "depth": 2}),
        "build cnn": (model_of, {"name": "cnn", "input_shape": (1, 8, 8), "num_classes": 3, "gates": (0.1, None)}),
        "cross-entropy": (loss(lipdp.losses.TauCrossEntropy), {"tau": 2.0, **scored}),
        "hinge": (loss(lipdp.losses.CategoricalHinge), {"margin": 1.0, **scored}),
        "multiclass": (loss(lipdp.losses.MulticlassHinge), {"num_classes": 3, "margin": 1.0, **scored}),
        "bce": (loss(lipdp.losses.TauBCEWithLogits), {"tau": 1.0, "num_outputs": 1, **scored, "logits": logits[:, :1]}),
        "cosine": (loss(lipdp.losses.CosineSimilarity), {"floor": 1.0, **scored}),
        "hkr": (loss(lipdp.losses.HKR), {"priors": [0.2, 0.3, 0.5], "alpha": 0.5, "margin": 1.0, **scored}),
        "mse": (loss(lipdp.losses.MeanSquaredError),
                {"target_bound": 1.0, "num_outputs": 3, **scored, "target": logits}),
        "mae": (loss(lipdp.losses.MeanAbsoluteError), {"num_outputs": 3, **scored, "target": logits}),
        "InputBound": (layer("InputBound"), {"bound": 1.0}),
        "GradientGate": (layer("GradientGate"), {"bound": 1.0}),
        "SpectralLinear": (layer("SpectralLinear"),
                           {"in_features": 4, "out_features": 3, "bias": True, "k_coef_lip": 1.0}),
        "SpectralConv2d": (layer("SpectralConv2d"),
                           {"in_channels": 1, "out_channels": 2, "kernel_size": 3, "stride": 1}),
        "Spectral": (project("Spectral"), {"radius": 1.0, "matrix": torch.ones(3, 4)}),
        "Orthogonal": (project("Orthogonal"), {"matrix": torch.ones(3, 4)}),
        "Frobenius": (project("Frobenius"), {"radius": 1.0, "matrix": torch.ones(3, 4)}),
        "poisson": (sampled(PoissonSampler), {"population": 12, "sampling_rate": 0.3, "steps": 3, "seed": 0}),
        "fixed size": (sampled(FixedSizeSampler), {"population": 12, "batch_size": 4, "steps": 3, "seed": 0}),
        "sensitivity": (lipdp.sensitivity, {"model": small_model(), "loss": lipdp.losses.TauCrossEntropy(),
                                            "input_shape": (4,), "gate": 0.5}),
        "lipschitz_constant": (lipdp.lipschitz_constant, {"model": small_model(), "input_shape": (4,)}),
        "make_private": (made_private, {**engine, "module": small_model(), "noise_multiplier": 2.0}),
        "make_private_with_epsilon": (made_private,
                                      {**engine, "module": small_model(), "target_epsilon": 5.0, "target_delta": 1e-5}),
        "load": (lipdp.data.load, {"name": "digits", "data_dir": "/nowhere"}),
        "split_validation": (lipdp.data.split_validation, {"split": split, "fraction": 0.1, "seed": 0}),
        "bounding": (bounded, {"name": "clip", "lower": 0.0, "upper": 1.0, "x": x}),
        "features": (featured,
                     {"name": "dct", "keep": 4, "unit_norm": True, "eps": 1e-5, "dtype": "float32",
                      "x": torch.zeros(2, 1, 8, 8)}),
        "configure": (lipdp.training.configure, {**dict.fromkeys(CONFIGURED), "dataset": "digits"}),
        "falsify_loss": (partial(lipdp.testing.falsify_loss, starts=1, steps=1),
                         {"loss": lipdp.losses.TauCrossEntropy(), "num_outputs": 3}),
        "falsify_layer": (partial(lipdp.testing.falsify_layer, starts=1, steps=1, climbs=1),
                          {"layer": torch.nn.ReLU(), "input_shape": (3,), "radius": 1.0}),
    }  # fmt: skip
    return calls


def sampled(sampler):
    def call(**given):
        batches = sampler(**given)
        return next(iter(batches))

    return call


def bounded(*, name, x, **given):
    return lipdp.data.bounding(name, **given)(x)


def featured(*, name, x, **given):
    return lipdp.features.features(name, **given)(x)


CONFIGURED = [
    "dataset", "model", "loss", "tau", "epsilon", "delta", "gate", "batch_size", "epochs", "steps", "lr", "momentum",
    "schedule", "optimizer", "ema", "seed", "threads", "device", "features", "model_options", "loss_options",
    "sampling",
]  # fmt: skip

CALLS = arguments_of_the_library()
OF_PRIVACY = ("epsilon", "calibrate", "poisson", "fixed size", "make_private", "make_private_with_epsilon")
"""Their arguments are checked for their range, not for their type (None, text): Python's TypeError comes through."""
NOT_REPLACED = (torch.Tensor, torch.nn.Module, torch.utils.data.Dataset, lipdp.data.Split)


@st.composite
def wrong_arguments(draw):
    """A call, and which of its arguments become what."""
    name = draw(st.sampled_from(sorted(set(CALLS) - {"Orthogonal", *OF_PRIVACY})))
    names = sorted(a for a, value in CALLS[name][1].items() if not isinstance(value, NOT_REPLACED))
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    return name, {argument: draw(st.integers(0, len(GARBAGE) - 1)) for argument in chosen}


def call_with(case):
    """True if it succeeded, False if the library refused."""
    name, replaced = case
    function, right = CALLS[name]
    given = {**right, **{argument: GARBAGE[k] for argument, k in replaced.items()}}
    try:
        with patience():
            function(**given)
    except LipdpError as error:
        message = str(error)
    else:
        return True
    assert message
    return False


@sweep(80, 6000)
def test_arguments_of_the_library(cases, tmp_path):
    succeeded = []
    tried(cases, wrong_arguments(), lambda case: succeeded.append(call_with(case)))
    assert {True, False} <= set(succeeded)
