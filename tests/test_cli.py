"""The command: its output, its files, its exit codes; nothing a user can get wrong ends in a traceback."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import typer
from rich.console import Console

import lipdp
from lipdp.cli import app, main
from lipdp.commands.console import parameter_table
from lipdp.commands.display import Screen, show_result
from lipdp.commands.lazily import with_options_named
from lipdp.commands.options import repeat_options
from lipdp.noise.allocation import get_allocation
from lipdp.report.parameters import parameter_rows
from lipdp.training import Trainer, configure

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", "NO_COLOR": "1"}
QUICK = ["--model", "linear", "--batch-size", "128", "--steps", "12", "--noise-multiplier", "2", "--accountant", "rdp"]


@pytest.fixture(autouse=True)
def _narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def lipdp_command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "lipdp", *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True,
        check=False, **options,
    )  # fmt: skip


def timeless(path):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (path / "metrics.jsonl").read_text().splitlines()
    ]


# --- the command itself -----------------------------------------------------------------------------------------------


def test_what_needs_no_torch_does_not_import_it():
    lines = [
        ["--help"], ["--version"], ["plan", "--help"], ["epsilon", "--help"],
        ["epsilon", "--noise-multiplier", "2", "--sampling-rate", "0.1", "--steps", "20"],
        ["plan", "--records", "1000", "--epsilon", "8", "--steps", "20", "--accountant", "rdp"],
    ]  # fmt: skip
    program = (
        "import sys; from lipdp.cli import main\n"
        f"for line in {lines}:\n"
        "    assert main(line) == 0, line\n"
        "    assert 'torch' not in sys.modules, line"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", ["", "plan", "compare"])
def test_a_groups_help_says_what_its_commands_say(path):
    group = typer.main.get_command(app)
    group = group.commands[path] if path else group
    with group.make_context("lipdp", ["--help"], resilient_parsing=True) as context:
        shown = {name: group.get_command(context, name).help for name in group.list_commands(context)}
    assert shown == {name: command.help.split("\n")[0].strip() for name, command in group.commands.items()}


def test_the_shell_completes_commands_and_their_options():
    def completed(words):
        program = "import sys; from lipdp.cli import main; sys.exit(main(['ignored']))"
        asked = {"_LIPDP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return subprocess.run(
            [sys.executable, "-c", program], env={**ENVIRONMENT, **asked}, capture_output=True, text=True, check=False
        ).stdout.split()

    assert completed("lipdp se") == ["sensitivity"]
    assert completed("lipdp plan --max") == ["--max-epochs", "--max-samples"]


# --- train ------------------------------------------------------------------------------------------------------------


def test_train_end_to_end_in_a_process_of_its_own(tmp_path):
    done = lipdp_command("train", "--epochs", "5", "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert all(
        len(line) <= 80 for line in done.stdout.splitlines() if "written to" not in line and "next: " not in line
    )
    for fact in (
        "add or remove one record",
        "T = 5 steps, B = 1437, q = 1",
        "σ = ",
        "δ = 1e-05",
        "2.weight",
        "not covered by ε",
        "this learning rate is far too small",  # for five steps; said once, and not on stderr
        f"next: lipdp report {tmp_path / 'run'}",
    ):
        assert fact in done.stdout
    privacy = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert 2.98 <= privacy["epsilon"] <= 3.0
    assert privacy["seeded"] is False
    assert privacy["accountant"] == "prv"
    last = timeless(tmp_path / "run")[-1]
    assert last["step"] == 5
    assert last["epsilon"] == privacy["epsilon"]
    assert "model" in torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)


@pytest.mark.usefixtures("one_thread")  # as the process that is interrupted: other threads sum in another order
def test_a_signal_ends_with_130_and_the_run_goes_on_bit_identical(commands, tmp_path, capsys):
    settings = ["--model", "mlp", "--steps", "30", "--batch-size", "256", "--noise-multiplier", "3", "--seed", "3"]
    settings += ["--log-every", "1", "--accountant", "rdp"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["train", *settings, "--out", str(whole)]) == 0
    answer = commands("train", *settings, "--out", parts, files=(str(parts / "metrics.jsonl"), 1), send=signal.SIGTERM)
    message = answer["errors"]
    assert answer["code"] == 130, answer["output"]
    assert re.fullmatch(rf"interrupted after step \d+ of 30; go on with --resume {re.escape(str(parts))}\n", message)
    step = json.loads((parts / "privacy.json").read_text())["steps"]
    assert 0 < step < 30

    assert main(["train", "--resume", str(parts)]) == 0
    assert f"resumed after step {step}" in capsys.readouterr().out
    one, other = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (whole, parts))
    for weights in ("model", "ema"):
        assert all(torch.equal(one[weights][name], other[weights][name]) for name in one[weights])
    assert timeless(whole) == timeless(parts)
    assert (whole / "privacy.json").read_text() == (parts / "privacy.json").read_text()


def test_without_out_a_run_has_a_folder_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK]) == 0
    assert main(["train", *QUICK, "--seed", "1"]) == 0
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    assert all(re.fullmatch(r"digits-linear-\d{8}-\d{6}(-\d+)?", folder.name) for folder in folders)
    assert "seeded: the noise can be repeated, so this run is NOT private" in capsys.readouterr().out


def test_options_reach_the_run(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom lipdp import nn as lnn\n"
        "def build(*, input_shape, num_classes, width=8):\n"
        "    return torch.nn.Sequential(lnn.InputBound(2.0), torch.nn.Flatten(), lnn.SpectralLinear(64, width),\n"
        "        lnn.GroupSort2(), lnn.SpectralLinear(width, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = [
        "train", "--model", "net:build", "--model-option", "width=12", "--loss", "hinge", "--loss-option", "margin=0.2",
        "--sampling", "fixed_size", "--allocation", "global", "--gate", "off", "--optimizer", "adam", "--lr", "0.02",
        "--momentum", "0", "--schedule", "cosine", "--ema", "0", "--microbatch", "64", "--steps", "4",
        "--batch-size", "100", "--epsilon", "2", "--delta", "1e-4", "--accountant", "pld", "--threads", "1",
        "--device", "cpu", "--out", "run",
    ]  # fmt: skip
    assert main(arguments) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    expected = {
        "model": "net:build", "model_options": {"width": 12}, "loss": "hinge",
        "loss_options": {"margin": 0.2}, "sampling": "fixed_size", "allocation": "global", "gate": None,
        "optimizer": "adam", "lr": 0.02, "momentum": 0.0, "schedule": "cosine", "ema": 0.0, "microbatch": 64,
        "steps": 4, "batch_size": 100, "epsilon": 2.0, "delta": 1e-4, "accountant": "pld", "threads": 1, "seed": None,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    privacy = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert (privacy["relation"], privacy["allocation"], privacy["accountant"]) == ("replace_one", "global", "pld")
    assert 1.98 <= privacy["epsilon"] <= 2.0
    last = timeless(tmp_path / "run")[-1]
    assert last["test_accuracy"] == last["test_accuracy_ema"]  # ema 0: the last weights


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(arguments, capsys):
    """The one message on stderr."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.strip()
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--dataset", "minst"], "mnist"),
        (["train", "--dataset", "mnist", "--data-dir", "/no/such/folder"], "/no/such/folder"),
        (["train", "--dataset", "/no/such.npz"], "no/such.npz"),
        (["train", "--model", "no_such_module:build"], "no_such_module"),
        (["train", "--model-option", "depth"], "key=value"),
        (["train", "--model-option", "deep=3"], "mlp has no option 'deep'; its own options are: width, depth"),
        (["train", "--loss-option", "foo=3"], "loss 'cross-entropy' has no option 'foo'; its own options are: tau"),
        (["train", "--loss-option", "ignore_index=no"], "ignore_index is a whole number, got 'no'"),
        (["train", "--bounding", "rescale", "--bounding-option", "top=3"], "own options are: lower, upper"),
        (["train", "--bounding-option", "upper=3"], "options {'upper': 3} were given, but no --bounding that"),
        (["train", "--feature-option", "J=3"], "but no --features that could take them"),
        (["train", "--model-options", "depth=3"], "--model-option"),
        (["train", "--gate", "low"], "--gate 'low'"),
        (["train", "--gate", "-1"], "--gate -1.0: a finite number > 0"),
        (["train", "--epsilon", "0"], "--epsilon 0.0: a finite number > 0"),
        (["train", "--epsilon", "1", "--noise-multiplier", "2"], "--epsilon and --noise-multiplier were both given"),
        (["train", "--certified", "--model", "mlp"], "--certified chooses the model and its features"),
        (["train", "--truncated-batch-size", "9", "--bands", "2", "--batch-size", "9"],
         "--truncated-batch-size is proven for --sampling poisson and --bands 1 alone"),
        (["train", "--device", "foo"], "--device foo: cpu, cuda, cuda:1, … or auto is needed"),
        (["train", "--device", "meta"], "--device meta cannot be used here"),
        (["train", "--resume", "/no/such/run"], "/no/such/run"),
        (["train", "--resume", "a", "--out", "b"], "--resume"),
        (["train", "--epsilonn", "1"], "--epsilonn"),
        (["train", "--epsilon", "one"], "--epsilon"),
        (["trian"], "trian"),
        (["epsilon"], "--noise-multiplier"),
        (["epsilon", "--noise-multiplier", "1"], "--sampling-rate"),
        (["epsilon", "--noise-multiplier", "1", "--sampling-rate", "0.1"], "neither --steps nor --epochs was given"),
        (["epsilon", "--noise-multiplier", "0", "--sampling-rate", "0.1", "--steps", "1"], "--noise-multiplier 0.0:"),
        (["epsilon", "--noise-multiplier", "1", "--sampling-rate", "1.5", "--steps", "1"], "(0, 1]"),
        (["epsilon", "--noise-multiplier", "1", "--sampling-rate", "0.1", "--steps", "1", "--delta", "0"], "--delta 0"),
        (["epsilon", "--noise-multiplier", "1", "--batch-size", "9", "--dataset-size", "3", "--steps", "1"],
         "--batch-size 9:"),
        (["calibrate", "--epsilon", "1", "--sampling-rate", "0.1", "--steps", "1", "--sampling", "shuffle"], "poisson"),
        (["calibrate", "--epsilon", "-1", "--sampling-rate", "0.1", "--steps", "1"], "--epsilon -1.0:"),
        (["calibrate", "--epsilon", "1", "--sampling-rate", "0.1", "--steps", "1", "--delta", "0.5"], "0.1"),
        (["schema", sys.executable], "is not text in UTF-8: give a .csv or .tsv file with a header line"),
        (["sensitivity", "--model", "cnn"], "--input-shape"),
        (["sensitivity", "--model", "mlp", "--input-shape", "4", "--batch-size", "0"], "--batch-size 0:"),
        (["sensitivity", "--model", "cnn", "--input-shape", "28"], "(28,)"),
        (["sensitivity", "--model", "cnn", "--input-shape", "1", "x"], "--input-shape"),
        (["sensitivity", "--model", "mlp", "--input-shape", "4", "--allocation", "even"], "per_layer"),
        (["sensitivity", "--model", "mlp", "--input-shape", "4", "--noise-multiplier", "-1"], "multiplier -1.0:"),
    ],
)  # fmt: skip
def test_what_a_user_gets_wrong_is_one_message_and_exit_code_2(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(arguments, capsys)
    assert named in " ".join(message.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(["train", *QUICK, "--out", str(tmp_path / "file" / "run")], capsys)


def test_a_used_folder_a_finished_run_and_other_facts_are_refused(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", *QUICK, "--out", out]) == 0
    assert f"--resume {out}" in refused(["train", *QUICK, "--out", out], capsys)
    assert "finished: all 12 steps" in refused(["train", "--resume", out], capsys)


def test_an_exception_of_our_own_stays_visible(monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr("lipdp.cli.app", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "/data/x"), 2, "/data/x: No space left on device"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 2, "--microbatch"),
        (MemoryError(), 2, "--microbatch"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_machine_lacks_is_a_message(error, code, message, monkeypatch, capsys):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr("lipdp.cli.app", failing)
    assert main(["train"]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step(number, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("lipdp.training.trainer.prepare", lambda *a, **k: signal.raise_signal(number))
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert main(["train", "--out", str(tmp_path / "run")]) == 130
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert capsys.readouterr().err.strip() == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


# --- the other commands -----------------------------------------------------------------------------------------------


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"lipdp {lipdp.__version__}"
    for command in ([], ["train"], ["sensitivity"], ["epsilon"], ["calibrate"]):
        assert main([*command, "--help"]) == 0
        assert "xample" in capsys.readouterr().out


def test_epsilon_by_every_accountant(capsys):
    arguments = [
        "epsilon",
        "--noise-multiplier",
        "1.5",
        "--batch-size",
        "100",
        "--dataset-size",
        "2000",
        "--epochs",
        "5",
    ]
    assert main([*arguments, "--delta", "1e-6", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["sampling_rate"], answer["steps"], answer["relation"]) == (0.05, 100, "add_or_remove_one")
    for name, value in answer["epsilon"].items():
        assert value == lipdp.epsilon(noise_multiplier=1.5, sampling_rate=0.05, steps=100, delta=1e-6, accountant=name)
    assert set(answer["epsilon"]) == {"prv", "pld", "rdp"}
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "q = 0.05, T = 100, δ = 1e-05, add or remove one" in table
    assert "cut" not in table
    assert all(name in table for name in answer["epsilon"])
    assert main([*arguments, "--truncated-batch-size", "150"]) == 0
    assert "add or remove one, a batch is full or cut with probability" in " ".join(capsys.readouterr().out.split())


def test_calibrate_by_every_accountant(capsys):
    arguments = ["calibrate", "--epsilon", "2", "--sampling-rate", "0.05", "--steps", "100", "--sampling", "fixed_size"]
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    for name, sigma in answer["noise_multiplier"].items():
        spent = lipdp.epsilon(
            noise_multiplier=sigma, sampling_rate=0.05, steps=100, delta=1e-5, accountant=name, relation="replace_one"
        )
        assert 1.99 <= spent <= 2.0
    assert main(arguments) == 0
    assert "target ε = 2" in capsys.readouterr().out


def test_notes_of_a_search_are_not_repeated(capsys, caplog):
    assert main(
        ["calibrate", "--epsilon", "0.0001", "--sampling-rate", "0.1", "--steps", "100", "--delta", "1e-9"]
    ) in (0, 2)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) <= 1
    assert sum("not from" in record.getMessage() for record in caplog.records) == 1  # nor is a search's every σ noted


@pytest.mark.parametrize("shape", [["1", "8", "8"], ["1x8x8"], ["1,8,8"]])
def test_sensitivity_says_what_the_library_says(shape, capsys):
    arguments = ["sensitivity", "--model", "cnn", "--input-shape", *shape, "--gate", "0.3", "--noise-multiplier", "2"]
    assert main([*arguments, "--allocation", "min_variance", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    model = lipdp.models.build("cnn", input_shape=(1, 8, 8), num_classes=10)
    bounds = lipdp.sensitivity(model, lipdp.losses.TauCrossEntropy(), (1, 8, 8), gate=0.3)
    assert [row["name"] for row in answer["parameters"]] == list(bounds)
    assert answer["total"] == pytest.approx(bounds.total, rel=1e-3)
    assert answer["loss_constant"] == 0.3
    assert sum(row["share"] for row in answer["parameters"]) == pytest.approx(1.0)
    assert sum((row["delta"] / row["std"]) ** 2 for row in answer["parameters"]) ** -0.5 == pytest.approx(2.0)
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in bounds)
    assert max(map(len, table.splitlines())) <= 80


def test_sensitivity_of_a_data_set_is_what_a_dry_run_of_train_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sensitivity", "--dataset", "digits", "--epsilon", "2"]) == 0
    shown = capsys.readouterr().out
    assert main(["train", "--dry-run", "--epsilon", "2"]) == 0
    plan = capsys.readouterr().out
    table = [line for line in shown.splitlines() if "weight" in line and "parameter" not in line]
    rows = [line for line in table if ".weight" in line]
    assert len(rows) == 2
    assert all(row in plan for row in rows)
    assert "TauCrossEntropy(tau=32.0), gate 0.3" in plan
    assert "TauCrossEntropy(tau=32.0), gradient at the logits ≤ 0.3" in shown.replace("\n", " ")
    assert "dry run: no step was taken, nothing was written" in plan
    assert "batch_size = 1437" in plan
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_spends_is_shown_before_its_features_are_computed(capsys, monkeypatch):
    seen, features = [], Screen.features
    monkeypatch.setattr(
        Screen, "features", lambda self, *told: seen.append(capsys.readouterr().out) or features(self, *told)
    )
    assert main(["train", "--dry-run", "--features", "dct", "--steps", "3", "--noise-multiplier", "3"]) == 0
    assert "T = 3 steps" in seen[0]
    assert "budget" in seen[0]
    after = "".join(seen[1:]) + capsys.readouterr().out
    assert "T = 3 steps" not in after
    assert "σ = 3 " in after


def test_rows_of_shared_and_unused_parameters():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bound = lipdp.nn.InputBound(1.0)
            self.twice = torch.nn.Linear(4, 4, bias=False)
            self.never = torch.nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.twice(self.twice(self.bound(x)))

    model = Odd()
    bounds = lipdp.sensitivity(model, lipdp.losses.TauCrossEntropy(), (4,))
    stds = get_allocation("per_layer").stds(torch.tensor(list(bounds.values())), torch.tensor([16.0, 16.0]), 1.0)
    drawn, sizes = dict(zip(bounds, stds.tolist(), strict=True)), {n: p.numel() for n, p in model.named_parameters()}
    twice, never = parameter_rows(bounds, drawn, sizes, batch_size=10, nodes=bounds.nodes)
    assert twice.share == 1.0
    assert twice.cotangent == max(node.cotangent for node in bounds.nodes if "twice.weight" in node.parameters)
    assert (never.delta, never.std, never.share) == (0.0, 0.0, 0.0)
    screen = io.StringIO()
    Console(file=screen, width=80).print(parameter_table([replace(twice, value=0.0)]))  # a head that begins at zero
    assert re.search(r"twice.weight +16 +- ", screen.getvalue())


# --- how it looks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True])
def test_the_screen_holds_eighty_columns(terminal, tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=terminal, color_system=None)
    with Screen(console) as monitor:
        monitor.features(5, 10)
        monitor.features(10, 10)
        config = configure(
            model="cnn", steps=6, batch_size=100, noise_multiplier=2.0, accountant="rdp", gate_quantile=0.5
        )
        result = Trainer(config, out=tmp_path, monitor=monitor).run()
    show_result(console, result)
    lines = re.split(r"[\n\r]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()))
    assert all(len(line) <= 80 for line in lines if "written to" not in line and "next: " not in line)
    text = " ".join(" ".join(lines).split())
    assert "gate from 0.3 to quantile 0.5" in text
    assert ("6/6 loss* " in text) == terminal
    assert "averaged weights" in text


@pytest.mark.parametrize(
    "text", ["batch_size.toml: none", "a,seed=1.csv", "'batch_size'", "x.py:batch_size", "C:\\steps=3"]
)
def test_what_was_typed_stays_in_a_refusal(text):
    options = typer.main.get_command(app).commands["train"].params
    assert with_options_named(text, options) == text
    assert with_options_named(f"{text}, steps=3", options) == f"{text}, --steps 3"


def test_values_in_a_row_are_spread_over_options():
    assert repeat_options(["--input-shape", "1", "2", "--model", "x", "y"], {"--input-shape"}) == [
        "--input-shape", "1", "--input-shape", "2", "--model", "x", "y",
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_an_output_without_greek_letters_spells_them(encoding, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding, write_through=True))
    command = ["epsilon", "--noise-multiplier", "1", "--sampling-rate", "0.01", "--steps", "10", "--delta", "1e-5"]
    assert main(command) == 0
    told = printed.getvalue().decode(encoding)
    assert "sigma" in told
    assert "epsilon" in told
