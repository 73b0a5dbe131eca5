"""`lipdp certify` and `lipdp compare robustness`, of trained models."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import lipdp
from lipdp.accounting import PrivacyPlan
from lipdp.certify.run import assess
from lipdp.cli import main
from lipdp.comparison.configs import RobustnessConfig
from lipdp.comparison.plots import front, robustness_figure
from lipdp.comparison.protocol import Task
from lipdp.comparison.robustness import robustness, table
from lipdp.comparison.trainers import get_trainer
from lipdp.data import Clip, load
from lipdp.errors import ParameterError
from lipdp.training import Trainer, configure

pytestmark = pytest.mark.usefixtures("one_thread")


MNIST = Path(__file__).parents[2] / "shared" / "data" / "mnist"


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"no MNIST at {MNIST}")
def test_pgd_breaks_no_certificate_of_1000_mnist_images():
    split = load("mnist", data_dir=MNIST)
    torch.manual_seed(0)
    model = lipdp.models.build("mlp", input_shape=(1, 28, 28), num_classes=10, width=64, depth=1, clips=0.5)
    task = Task(
        dataset=torch.utils.data.TensorDataset(split.train_x[:10_000], split.train_y[:10_000]),
        loss=lipdp.losses.TauCrossEntropy(8.0),
        plan=PrivacyPlan(dataset_size=10_000, expected_batch_size=500, steps=60, noise_multiplier=1.0),
        optimizer=partial(torch.optim.SGD, lr=2.0, momentum=0.9),
        seed=0,
    )
    get_trainer("non_private").train(model, task)
    result = assess(
        model, split.test_x[:1000], split.test_y[:1000], radii=[36 / 255, 72 / 255, 255 / 255], maps=[Clip()],
        attack=True, steps=15, restarts=1,
    )  # fmt: skip
    assert result.certificate.accuracy() > 0.85
    assert result.certified[0] > 0.6
    assert result.broken_inside == 0
    assert result.attacked_inside > 800
    assert all(c <= a <= result.certificate.accuracy() for c, a in zip(result.certified, result.attacked, strict=True))
    assert result.attacked[2] < 0.8  # it does break what is not certified


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = configure(dataset="digits", model="mlp", steps=25, noise_multiplier=1.5, seed=0, accountant="rdp")
    Trainer(config, out=folder).run()
    return folder


def test_certify_of_a_run(run, capsys):
    arguments = ["certify", run, "--radii", "0.05", "51/255", "--attack", "--samples", "80", "--steps", "8"]
    assert main([str(a) for a in arguments]) == 0
    shown = capsys.readouterr().out
    assert "PGD inside certified radii: 0 of" in shown
    found = json.loads((run / "certificate.json").read_text())
    assert found["radii"] == [0.05, 0.2]
    assert found["samples"] == 80
    assert found["attack"]["broken_at_own_radius"] == 0
    assert found["epsilon"] > 0
    assert 1 >= found["accuracy"] >= found["attacked_accuracy"][0] >= found["certified_accuracy"][0] > 0.3
    assert found["certified_accuracy"][0] > found["certified_accuracy"][1]
    assert found["seconds_per_10000_samples"] > 0
    assert (run / "certificate.png").read_bytes()[:4] == b"\x89PNG"
    assert "</svg>" in (run / "certificate.svg").read_text()
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    for weights, name in (("model", "test_accuracy"), ("ema", "test_accuracy_ema")):
        assert main(["certify", str(run), "--weights", weights, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(metrics[name], abs=1e-9)


def test_certify_refuses_with_one_message(run, tmp_path, capsys):
    for arguments, message in (
        (["certify", tmp_path / "none"], "is .* the folder of a run"),
        (["certify", run, "--radii", "far"], "a number such as"),
        (["certify", run, "--radii", "1/0"], "a number such as"),
        (["certify", run, "--radii", "0.1", "--samples", "0"], "at least 1"),
        (["certify", run, "--weights", "best"], "unknown weights"),
    ):
        assert main([str(a) for a in arguments]) == 2
        assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_the_certified_recipe_finds_radii_that_an_attack_does_not_break(tmp_path, capsys):
    config = configure(dataset="digits", certified=True, seed=0, accountant="rdp")
    assert (config.features, config.model) == ("energies", "linear")
    assert configure(dataset="mnist", certified=True).feature_options["pictures"] == "handwriting"
    with pytest.raises(ParameterError, match="leave out model"):
        configure(certified=True, model="cnn")
    with pytest.raises(ParameterError, match="certified=True is for energies"):
        dataclasses.replace(config, features="dct", feature_options={})
    folder = tmp_path / "run"
    trainer = Trainer(config, out=folder)
    (sensitivity,) = trainer.engine.sensitivity().values()
    assert 0.5 <= sensitivity <= 0.51  # the gate: the head divides its inputs by their bound, as `head_rate` takes it
    trainer.run()
    arguments = ["certify", str(folder), "--radii", "36/255", "--attack", "--samples", "100", "--steps", "8", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["attack"]["attacked_at_own_radius"] > 50
    assert found["attack"]["broken_at_own_radius"] == 0
    assert found["accuracy"] >= found["attacked_accuracy"][0] >= found["certified_accuracy"][0] > 0.4


UNBOUNDED = """
import torch, lipdp
class Square(torch.nn.Module):
    def forward(self, x):
        return x * x
def build(*, input_shape, num_classes):
    return torch.nn.Sequential(
        torch.nn.Flatten(), Square(), lipdp.nn.ValueClip(1.0), lipdp.nn.SpectralLinear(64, num_classes)
    )
"""


def test_a_run_whose_model_has_no_constant_is_refused(tmp_path, capsys, monkeypatch):
    """Its sensitivity is bounded (a clip in front of the only weights), its constant is not."""
    (tmp_path / "boundless.py").write_text(UNBOUNDED)
    monkeypatch.chdir(tmp_path)
    config = configure(
        dataset="digits", model="boundless:build", steps=2, noise_multiplier=9.0, seed=0, accountant="rdp"
    )
    Trainer(config, out=tmp_path / "run").run()
    assert main(["certify", str(tmp_path / "run")]) == 2
    assert "no finite Lipschitz constant" in capsys.readouterr().err
    assert not (tmp_path / "run" / "certificate.json").exists()


def test_a_table_gets_a_certified_auroc(tmp_path, capsys):
    rng = np.random.default_rng(0)
    y = np.arange(300) % 2
    np.savez(tmp_path / "table.npz", X=rng.normal(size=(300, 5)) + 2.0 * y[:, None], y=y)
    given = {"model": "tabular", "bounding": "rescale", "bounding_options": {"lower": [-3.0] * 5, "upper": [6.0] * 5}}
    given |= {"steps": 20, "batch_size": 100, "noise_multiplier": 1.0, "seed": 0, "accountant": "rdp"}
    Trainer(configure(dataset=str(tmp_path / "table.npz"), **_tupled(given)), out=tmp_path / "run").run()
    assert main(["certify", str(tmp_path / "run"), "--radii", "0.2", "2.0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 1 >= found["auroc"] > found["certified_auroc"][0] > found["certified_auroc"][1]
    assert found["auroc"] > 0.8
    assert main(["certify", str(tmp_path / "run"), "--radii", "90"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "No record is certified this far: the largest radius is" in shown
    assert "train tables with --model linear" in shown


def _tupled(given):
    options = {k: tuple(v) for k, v in given["bounding_options"].items()}
    return {**given, "bounding_options": options}


def test_compare_robustness_is_resumable_and_certifies_every_trainer(tmp_path):
    config = RobustnessConfig(taus=(4.0, 32.0), epochs=12, samples=120, radii=(0.05, 0.2), lr=0.5)
    with pytest.raises(KeyboardInterrupt):
        robustness(config, out=str(tmp_path), progress=_stop)
    seen = []
    results = robustness(config, out=str(tmp_path), progress=lambda *told: seen.append(told))
    assert [done for _, done, _ in seen] == list(range(2, len(results.cells) + 1))
    assert {total for *_, total in seen} == {len(results.cells)}
    found = {(c["trainer"], c["model"], c["tau"]): c for c in results.cells}
    names = [(t, "mlp") for t in ("clipless", "opacus_hooks", "non_private")]
    assert set(found) == {(*n, tau) for n in names for tau in (4.0, 32.0)} | {("non_private", "mlp-twin", 1.0)}
    for cell in results.cells:
        assert (cell["epsilon"] is None) == (cell["trainer"] == "non_private")
        assert cell["epsilon"] is None or 2.9 < cell["epsilon"] <= 3.0
        assert cell["accuracy"] >= cell["certified_accuracy"][0] >= cell["certified_accuracy"][1]
    free, twin = found["non_private", "mlp", 4.0], found["non_private", "mlp-twin", 1.0]
    assert free["accuracy"] > 0.8
    assert twin["lipschitz"] > free["lipschitz"]
    assert free["certified_accuracy"][1] > twin["certified_accuracy"][1]
    assert [c["accuracy"] for c in front(results.cells)] == sorted(
        (c["accuracy"] for c in front(results.cells)), reverse=True
    )
    assert "mlp-twin" in table(results)
    labels = [text.get_text() for text in robustness_figure(results).axes[0].get_legend().get_texts()]
    assert any(label.startswith("opacus_hooks, mlp, ε") for label in labels)
    assert labels[-1] == "Pareto front"


def _stop(*told):
    raise KeyboardInterrupt


def test_compare_robustness_says_why_a_model_has_no_certificate(tmp_path, monkeypatch):
    (tmp_path / "boundless.py").write_text(UNBOUNDED)
    monkeypatch.chdir(tmp_path)
    config = RobustnessConfig(model="boundless:build", trainers=("clipless",), taus=(8.0,), epochs=2, samples=50)
    with pytest.raises(ParameterError, match="tau"):
        RobustnessConfig(taus=())
    monkeypatch.setattr("lipdp.comparison.contenders.build", lambda name, **o: lipdp.models.build(name, **_own(o)))
    (cell,) = robustness(config).cells
    assert cell["lipschitz"] is None
    assert cell["certified_accuracy"] == [0.0] * 4
    assert "no finite Lipschitz constant" in cell["refused"]
    assert cell["accuracy"] >= 0


def _own(options):
    return {k: v for k, v in options.items() if k != "twin"}
