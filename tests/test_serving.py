"""A trained model read from its folder answers as it did in training, and so does what it is exported to."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch

import lipdp
from lipdp import errors
from lipdp.certify.run import load_run
from lipdp.cli import main
from lipdp.data import load as load_data
from lipdp.losses import TauCrossEntropy
from lipdp.report.reading import read_run
from lipdp.training import configure, train

quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train(configure(dataset="digits", steps=3, noise_multiplier=2.0, seed=0), out=folder)
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table that is missing numbers, and its run."""
    folder = tmp_path_factory.mktemp("tables")
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    y = (x[:, 0] > 0).astype(int)
    x[::9, 1] = np.nan
    np.savez(folder / "table.npz", X=x, y=y)
    train(configure(dataset=str(folder / "table.npz"), steps=3, epsilon=4.0, seed=0), out=folder / "run")
    return folder, x


@pytest.fixture
def digits():
    return load_data("digits").test_x


def test_a_run_is_loaded_without_its_data_and_answers_as_in_training(run, digits):
    model = lipdp.load(run)
    split = load_data("digits")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (model.predict(digits) == split.test_y.numpy()).mean() == pytest.approx(last["test_accuracy"])
    assert model.tau == model.config.loss_options["tau"] == 32.0
    assert model.config.bounding == "clip"
    averaged = lipdp.load(run, weights="ema")
    assert not np.array_equal(averaged.logits(digits), model.logits(digits))


def test_probabilities_are_those_whose_loss_was_trained(run, digits):
    model = lipdp.load(run)
    logits, y = torch.from_numpy(model.logits(digits)), load_data("digits").test_y
    share = torch.from_numpy(model.predict_proba(digits))
    torch.testing.assert_close(-share[torch.arange(len(y)), y].log() / 32.0, TauCrossEntropy(32.0)(logits, y))
    torch.testing.assert_close(share.sum(1), torch.ones(len(y)))


def test_the_input_map_is_folded_in(run, digits):
    model = lipdp.load(run)
    np.testing.assert_array_equal(model.logits(digits + 5), model.logits(torch.ones_like(digits)))  # pixels end at 1
    np.testing.assert_array_equal(model.logits(digits.fill_(float("nan"))), model.logits(torch.zeros_like(digits)))
    np.testing.assert_allclose(model.logits(np.full((1, 8, 8), 255, np.uint8)), model.logits(np.ones((1, 8, 8))))


@quiet
def test_exports_answer_alike_without_lipdp(run, table, tmp_path, digits):
    for name, folder, x in (("digits", run, digits.numpy()), ("table", table[0] / "run", table[1])):
        model = lipdp.load(folder)
        expected = model.predict_proba(x)
        program = torch.export.load(model.export(tmp_path / f"{name}.pt2")).module()
        np.testing.assert_allclose(program(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(torch.jit.script(lipdp.nn.to_torch(model.network))(
            model.bounding(model.inputs(x))).detach().numpy(), model.logits(x), atol=1e-5)  # fmt: skip
        assert not [m for m in lipdp.nn.to_torch(model.network).modules() if type(m).__module__.startswith("lipdp")]


@quiet
def test_onnx_answers_alike(run, table, tmp_path, digits):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    for name, folder, x in (("digits", run, digits.numpy()), ("table", table[0] / "run", table[1])):
        model = lipdp.load(folder)
        evaluator = reference.ReferenceEvaluator(str(model.export(tmp_path / f"{name}.onnx")))
        (found,) = evaluator.run(None, {"x": x[:20]})
        np.testing.assert_allclose(found, model.predict_proba(x[:20]), atol=1e-5)


def test_what_onnx_cannot_express_is_one_line(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript")

    def fails(*given, **options):
        raise RuntimeError("steps\nno function for signbit")

    monkeypatch.setattr(torch.onnx, "export", fails)
    assert main(["export", str(run), str(tmp_path / "model.onnx")]) == 2
    assert "ONNX can't express this model (no function for signbit); use .pt2" in capsys.readouterr().err


def test_a_folder_with_safetensors_and_a_card(run, table, tmp_path, digits):
    pytest.importorskip("safetensors")
    for name, folder, x in (("digits", run, digits), ("table", table[0] / "run", table[1])):
        model = lipdp.load(folder)
        again = lipdp.load(model.save_pretrained(tmp_path / name))
        np.testing.assert_array_equal(again.predict_proba(x), model.predict_proba(x))
        assert {p.name for p in (tmp_path / name).iterdir()} == {
            *("README.md", "config.json", "model.safetensors", "privacy.json")
        }
        card = (tmp_path / name / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: lipdp\n")
        assert "NOT PRIVATE" in card
        assert f'lipdp.load("{name}")' in card
        with pytest.raises(errors.ParameterError, match="not empty"):
            model.save_pretrained(tmp_path / name)


def test_the_commands(run, tmp_path, digits, capsys):
    np.save(tmp_path / "x.npy", digits.numpy())
    assert main(["predict", str(run), str(tmp_path / "x.npy")]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [int(row["label"]) for row in rows] == lipdp.load(run).predict(digits).tolist()
    assert float(rows[0]["probability_3"]) == pytest.approx(lipdp.load(run).predict_proba(digits)[0, 3], rel=1e-4)
    assert main(["export", str(run), str(tmp_path / "folder")]) == 0
    assert main(["export", str(run), str(tmp_path / "model.txt")]) == 2
    assert main(["predict", str(run), str(tmp_path / "none.npy")]) == 2


def test_a_csv_with_a_header_and_a_missing_cell(table, tmp_path):
    (tmp_path / "x.csv").write_text("a,b,c,d\n1,,3,4\n0.5,1,2,3\n")
    (tmp_path / "bare.csv").write_text("1,,3,4\n0.5,1,2,3\n")
    model = lipdp.load(table[0] / "run")
    for name in ("x.csv", "bare.csv"):
        x = lipdp.serving.read_records(tmp_path / name)
        np.testing.assert_array_equal(model.predict_proba(x), model.predict_proba([[1, 0, 3, 4], [0.5, 1, 2, 3]]))


def test_what_cannot_be_used_is_refused(run, tmp_path):
    model = lipdp.load(run)
    for bad in (np.zeros((2, 3)), np.zeros((2, 1, 9, 9)), np.array(["a"])):
        with pytest.raises(errors.DataError, match=r"takes \(N, 1, 8, 8\)|numbers are needed"):
            model.predict(bad)
    with pytest.raises(errors.UnknownNameError):
        lipdp.load(run, weights="best")
    with pytest.raises(errors.CheckpointError, match=r"nowhere is not a folder; give the one that lipdp train wrote"):
        lipdp.load(tmp_path / "nowhere")
    with pytest.raises(errors.CheckpointError):
        lipdp.load(tmp_path)


def test_code_of_its_own_runs_only_if_allowed(tmp_path, monkeypatch):
    (tmp_path / "own_served.py").write_text(
        "import lipdp\ndef net(*, input_shape, num_classes):\n"
        "    return lipdp.models.build('mlp', input_shape=input_shape, num_classes=num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    train(configure(dataset="digits", model="own_served:net", steps=1, noise_multiplier=9.0, seed=0), out="own")
    with pytest.raises(errors.ParameterError, match="run_code"):
        lipdp.load("own")
    assert lipdp.load("own", run_code=True).predict(np.zeros((2, 1, 8, 8))).shape == (2,)


def test_a_loss_without_probabilities_says_so(tmp_path):
    train(
        configure(dataset="digits", loss="multiclass-hinge", steps=1, noise_multiplier=9.0, seed=0), out=tmp_path / "r"
    )
    model = lipdp.load(tmp_path / "r")
    assert model.tau is None
    with pytest.raises(errors.ParameterError, match="no probabilities"):
        model.predict_proba(np.zeros((1, 1, 8, 8)))
    assert model.as_module()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


# --- frozen encoders ------------------------------------------------------------------------------------------------


@pytest.fixture
def encoders(tmp_path, monkeypatch):
    (tmp_path / "encoders_served.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def conv():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.AvgPool2d(2))\n"
        "class Mixing(nn.Module):\n    def forward(self, x):\n        return x.flatten(1) - x.flatten(1).mean(0)\n"
        "def mixing():\n    return Mixing()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIPDP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_frozen_module_is_a_feature_map_and_its_run_is_served(encoders, digits, capsys):
    config = configure(dataset="digits", features="encoders_served:conv", epsilon=8.0, epochs=10, seed=0)
    result = train(config, out="run")
    assert result.metrics["test_accuracy"] > 0.7
    assert list((encoders / "cache").rglob("frozen-*.npy"))
    model = lipdp.load("run", run_code=True)
    share = (model.predict(digits) == load_data("digits").test_y.numpy()).mean()
    assert share == pytest.approx(result.metrics["test_accuracy"], abs=0.003)
    with pytest.raises(errors.ParameterError, match="run_code"):
        lipdp.load("run")
    assert main(["certify", "run"]) == 2
    assert "nothing is known of the Lipschitz constant of encoders_served:conv" in capsys.readouterr().err


def test_features_of_a_frozen_module_have_norm_one_and_mixing_is_refused(encoders):
    spec = lipdp.features.features("encoders_served:conv")
    assert spec.norm_bound((1, 8, 8)) == 1.0
    assert spec(torch.randn(5, 1, 8, 8)).norm(dim=1).max() <= 1 + 1e-6
    assert lipdp.features.features(**spec.to_json()) == spec
    with pytest.raises(errors.MixesSamplesError, match="depend on the others"):
        lipdp.features.features("encoders_served:mixing").output_shape((1, 8, 8))
    with pytest.raises(errors.ParameterError, match="nothing bounds"):
        lipdp.features.features("encoders_served:conv", unit_norm=False)
    with pytest.raises(errors.UnknownNameError):
        configure(features="wavelets")


def test_the_model_of_a_run_that_averages_its_last_steps_is_the_average(tmp_path):
    run = tmp_path / "run"
    train(configure(dataset="digits", noise_multiplier=4.0, steps=6, batch_size=64, tail=3, seed=0), out=run)
    default, averaged, last = (
        lipdp.load(run, **given).network.state_dict() for given in ({}, {"weights": "ema"}, {"weights": "model"})
    )
    assert all(torch.equal(default[name], averaged[name]) for name in default)
    assert not all(torch.equal(default[name], last[name]) for name in default)
    scores = read_run(run)
    assert scores.score() == scores.score(averaged=True)
    assert load_run(run).weights == "ema"
