"""The recipe for tables: sensitivities that are not 5 % too large, one account, a map that is saved with the model."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import nn

import lipdp
from lipdp.accounting.accountants import epsilon, get_accountant
from lipdp.accounting.plan import Measurement, PrivacyPlan
from lipdp.certify import certify
from lipdp.certify.run import load_run
from lipdp.cli import main
from lipdp.data import Rescale, SignedLog, is_table
from lipdp.errors import CheckpointError, DataError, EngineError, ParameterError, ResumeError, UnknownNameError
from lipdp.nn.table import BINS, TableFeatures, unit_norm
from lipdp.training import Monitor, Trainer, configure, fit_table, table_recipe
from lipdp.training.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

MAP = SignedLog(scale=0.01, limit=16 / math.log1p(100))


class Recorder:
    """An engine that adds no noise and keeps what was to be released."""

    def __init__(self, records=1000, std=1.0):
        self.released, self.std = {}, std
        self.plan = PrivacyPlan(dataset_size=records, expected_batch_size=records, steps=1, noise_multiplier=1.0)

    def measure_(self, name, total, *, sensitivity):
        self.released[name] = (total.clone(), sensitivity)
        return self.std


def rows(x, weight=None):
    return lambda: iter([(x, weight)])


def table(count=300, columns=4, seed=0):
    generator = np.random.default_rng(seed)
    y = (generator.random(count) < 0.4).astype(np.int64)
    return generator.normal(size=(count, columns)) * [1, 10, 0.1, 100][:columns] + 1.5 * y[:, None], y


# --- sensitivities ----------------------------------------------------------------------------------------------------

WORST = torch.tensor([[0.0] * 5, [1e30] * 5, [math.nan] * 5, [-1e30, 3.0, math.inf, 0.01, 7.0]])


def moved(measure, x, extra):
    """How far one record more moves what is released, and the sensitivity that was stated."""
    (a, stated), (b, _) = measure(x), measure(torch.cat((x, extra)))
    return float((b - a).norm()), stated


@pytest.mark.parametrize("extra", WORST.split(1))
def test_a_record_moves_the_histograms_by_the_root_of_the_columns(extra):
    def measure(x):
        engine, features = Recorder(), TableFeatures(5)
        table_recipe.set_public_map(features, MAP)
        table_recipe.fit_map(engine, features, MAP, rows(MAP(x)))
        return engine.released["histogram"]

    found, stated = moved(measure, torch.randn(30, 5), extra)
    assert 0.95 * stated < found <= stated
    assert stated == pytest.approx(math.sqrt(5))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
def test_a_record_moves_the_gram_matrix_by_one(scale):
    torch.manual_seed(0)
    features = nn.Sequential(TableFeatures(5), unit_norm())

    def measure(x):
        engine = Recorder()
        table_recipe.measure_gram(engine, features, rows(x))
        return engine.released["gram"]

    found, stated = moved(measure, torch.rand(30, 5), scale * torch.randn(1, 5))
    assert 0.95 * stated < found <= stated == pytest.approx(1.0)


def test_what_is_released_of_the_gram_matrix_is_isometric_to_it():
    """Without √2 off the diagonal a unit vector of equal entries would move it by 0.72 only: noise is well spent."""

    class Own(nn.Module):
        def forward(self, x):
            return x

    spread = torch.full((1, 64), 1 / 8.0)
    for phi in (spread, torch.eye(64)[:1]):
        engine = Recorder()
        gram, off_diagonal = table_recipe.measure_gram(engine, Own(), rows(phi))
        released, stated = engine.released["gram"]
        assert float(released.norm()) == pytest.approx(stated)
        assert torch.allclose(gram, (phi.T @ phi).double())
        assert off_diagonal == pytest.approx(engine.std / math.sqrt(2))


def test_an_owner_counts_as_one_record():
    x, weight = torch.rand(6, 5), torch.full((6,), 1 / 6, dtype=torch.float64)
    engine, features = Recorder(), nn.Sequential(TableFeatures(5), unit_norm())
    table_recipe.measure_gram(engine, features, rows(x, weight))
    table_recipe.fit_map(engine, features[0], MAP, rows(x, weight))
    for released, stated in engine.released.values():
        assert released.norm() <= stated


def test_features_have_norm_at_most_one_as_computed():
    torch.manual_seed(0)
    for columns in (1, 2, 7, 60):
        features = TableFeatures(columns)
        features.set_(3.0, 4 * torch.randn(columns, BINS + 1))
        phi = nn.Sequential(features, unit_norm())(torch.randn(500, columns) * 10)
        norms = phi.double().norm(dim=1)
        assert norms.max() <= 1.0
        assert norms.min() > 1 - 1e-6
        raw = features(torch.randn(500, columns) * 10).double().norm(dim=1)
        assert raw.max() <= features.value_bound() * (1 + 1e-6)


@pytest.mark.parametrize("columns", [1, 3])
def test_the_lipschitz_constant_of_the_features_is_reached(columns):
    torch.manual_seed(0)
    features = TableFeatures(columns).double()
    features.set_(2.0, torch.linspace(-2, 2, BINS + 1).expand(columns, -1) * 1.5)  # one slope: the constant is exact
    x = torch.rand(20, columns).double()
    moves = 1e-6 * torch.eye(columns).double()
    slopes = [(features(x + move) - features(x - move)) / 2e-6 for move in moves]
    measured = torch.linalg.matrix_norm(torch.stack(slopes, dim=2), 2).max()
    assert 0.95 * features.lipschitz() < measured <= features.lipschitz() * (1 + 1e-5)


def test_the_gate_is_the_sensitivity_of_the_head():
    model = lipdp.models.build("tabular", input_shape=(5,), num_classes=1)
    s = lipdp.sensitivity(model, lipdp.losses.TauBCEWithLogits(), input_shape=(5,), gate=0.5)
    assert s["2.weight"] == pytest.approx(0.5, rel=1e-3)
    value = model(100 * torch.randn(1, 5))
    value.backward(torch.full_like(value, 0.5))  # a cotangent at the gate
    measured = float(model[2].weight.grad.double().norm())
    assert 0.95 * s["2.weight"] < measured <= s["2.weight"]


# --- one account ------------------------------------------------------------------------------------------------------


def test_a_plan_shares_its_budget_with_measurements():
    given = {"dataset_size": 900, "expected_batch_size": 900, "steps": 50, "target_delta": 1e-5}
    plan = PrivacyPlan.of(**given, target_epsilon=1.0, shares={"histogram": 0.03, "gram": 0.097})
    assert [event.steps for event in plan.events] == [1, 1, 50]
    assert 0.99 <= plan.predicted.epsilon <= 1.0
    joint = sum(event.steps / event.noise_multiplier**2 for event in plan.events) ** -0.5  # Gaussian mechanisms compose
    assert plan.predicted.epsilon == pytest.approx(
        epsilon(noise_multiplier=joint, sampling_rate=1.0, steps=1, delta=1e-5), rel=0.01
    )
    spent = [event.steps / event.noise_multiplier**2 * joint**2 for event in plan.events]
    assert spent == pytest.approx([0.03, 0.097, 0.873], rel=0.02)
    again = PrivacyPlan.of(**given, target_epsilon=1.0, noise_multiplier=plan.noise_multiplier,
                           shares={"histogram": 0.03, "gram": 0.097})  # fmt: skip
    assert again == plan
    free = PrivacyPlan.of(**given, noise_multiplier=40.0, shares={"gram": 0.5})
    assert free.measurements[0].noise_multiplier == pytest.approx(40 / math.sqrt(50))
    for shares in ({"gram": 1.0}, {"gram": 0.0}):
        with pytest.raises(ParameterError, match="sum below 1"):
            PrivacyPlan.of(**given, target_epsilon=1.0, shares=shares)
    with pytest.raises(ParameterError, match="one name"):
        PrivacyPlan(dataset_size=9, expected_batch_size=9, steps=1, noise_multiplier=1.0,
                    measurements=(Measurement("a", 1.0), Measurement("a", 1.0)))  # fmt: skip


def private(**given):
    x, y = table()
    model = lipdp.models.build("tabular", input_shape=(4,), num_classes=1)
    data = torch.utils.data.TensorDataset(torch.tensor(x).float(), torch.tensor(y))
    plan = PrivacyPlan.of(dataset_size=300, expected_batch_size=300, steps=3, noise_multiplier=20.0, target_delta=1e-5,
                          accountant="rdp", shares={"gram": 0.5}, **given)  # fmt: skip
    engine = lipdp.PrivacyEngine("rdp", seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = lipdp.losses.TauBCEWithLogits()
    _, _, loader, _ = engine.make_private_with_plan(
        plan, module=model, optimizer=optimizer, criterion=loss, dataset=data
    )
    return engine, optimizer, loader


@pytest.mark.parametrize(("sampling", "factor"), [("poisson", 1.0), ("fixed_size", 2.0)])
def test_a_measurement_is_an_event_with_its_noise(sampling, factor):
    engine, optimizer, loader = private(sampling=sampling)
    total = torch.zeros(20_000, dtype=torch.float64)
    std = engine.measure_("gram", total, sensitivity=3.0)
    assert std == pytest.approx(3.0 * factor * engine.plan.measurements[0].noise_multiplier)
    assert 0.97 < float(total.std()) / std < 1.03  # neither 5 % less nor more
    for batch in loader:
        optimizer.zero_grad()
        engine.backward(*batch)
        optimizer.step()
    assert engine.measured == ("gram",)
    assert engine.steps_taken == 3  # all steps of the plan are left, and measurements are none
    expected = get_accountant("rdp").epsilon(engine.plan.events, 1e-5).epsilon
    assert engine.get_epsilon(1e-5) == pytest.approx(expected)
    assert engine.plan.predicted.epsilon == pytest.approx(expected)


def test_what_may_not_be_measured():
    engine, *_ = private()
    with pytest.raises(UnknownNameError, match="histogram"):
        engine.measure_("histogram", torch.zeros(3), sensitivity=1.0)
    with pytest.raises(EngineError, match="not finite"):
        engine.measure_("gram", torch.tensor([math.nan]), sensitivity=1.0)
    for dtype in (torch.bfloat16, torch.int64):
        with pytest.raises(EngineError, match="sum in float64"):
            engine.measure_("gram", torch.zeros(3, dtype=dtype), sensitivity=1.0)
    assert engine.get_epsilon(1e-5) == 0.0
    engine.measure_("gram", torch.zeros(3), sensitivity=1.0)
    with pytest.raises(EngineError, match="measured already"):
        engine.measure_("gram", torch.zeros(3), sensitivity=1.0)


# --- the map ----------------------------------------------------------------------------------------------------------


def test_ranks_follow_the_histogram_and_scales_do_not_matter():
    torch.manual_seed(0)
    x = torch.rand(20_000, 2) * torch.tensor([1.0, 1000.0])
    features = TableFeatures(2)
    table_recipe.set_public_map(features, MAP)
    table_recipe.fit_map(Recorder(20_000, std=0.01), features, MAP, rows(MAP(x)))
    u = features(MAP(x))[:, 1:3] * math.sqrt(6)
    assert u.mean(0).abs().max() < 0.02  # uniform on ±√3, at both scales
    assert (u.std(0) - 1).abs().max() < 0.02
    public = TableFeatures(2)
    table_recipe.set_public_map(public, MAP)
    table_recipe.fit_map(
        Recorder(10, std=1000.0), features, MAP, rows(MAP(x))
    )  # noise above everything: the public map
    assert torch.equal(features.values, public.values)


def test_the_public_map_keeps_intervals():
    features = TableFeatures(1)
    for bounding in (Rescale(2.0, 5.0), lipdp.data.Tanh(), lipdp.data.Clip(-1.0, 1.0)):
        table_recipe.set_public_map(features, bounding)
        assert features(torch.tensor([[1.0], [0.0], [-1.0], [9.0]]))[:, 1].tolist() == pytest.approx([1, 0, -1, 1])
    assert table_recipe.measured_shares(Rescale()).keys() == {"gram"}
    assert table_recipe.measured_shares(MAP).keys() == {"histogram", "gram"}
    assert torch.allclose(MAP(MAP.inverse(features.edges())), features.edges())


# --- arrays -----------------------------------------------------------------------------------------------------------


def test_metrics_of_a_rare_class():
    scores = torch.tensor([[2.0], [-1.0], [0.5], [-2.0], [-3.0]])
    found = evaluate(nn.Identity(), scores, torch.tensor([1, 1, 0, 0, 0]), binary=True)
    assert found["base_rate"] == 0.4
    assert found["recall"] == 0.5
    assert found["specificity"] == pytest.approx(2 / 3)
    assert found["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["auroc"] == pytest.approx(5 / 6)


def test_no_metric_of_a_perfect_ranking_is_above_one():
    """sklearn's sum of nine ninths is 1 + 2e-16, which the report took for a damaged file."""
    scores = torch.arange(12.0)[:, None] - 2.5
    found = evaluate(nn.Identity(), scores, torch.tensor([0] * 3 + [1] * 9), binary=True)
    assert average_precision_score([0] * 3 + [1] * 9, scores[:, 0]) > 1
    assert set(found.values()) == {0.75, 1.0}


@pytest.mark.parametrize("classes", [2, 3])
def test_fit_table_learns(classes):
    generator = np.random.default_rng(0)
    y = generator.integers(0, classes, 1500)
    x = generator.normal(size=(1500, 3))
    x[np.arange(1500), y] += 3.0
    fitted = fit_table(x, y, epsilon=3.0, delta=1e-5, num_classes=classes, steps=30, accountant="rdp", seed=0,
                       class_weight=[1.0] * classes)  # fmt: skip
    assert 2.9 < fitted.epsilon <= 3.0
    probabilities = fitted.probabilities(x)
    assert torch.allclose(probabilities.sum(1), torch.ones(1500, dtype=torch.float64))
    assert (probabilities.argmax(1).numpy() == y).mean() > 0.85
    said = fitted.statement()
    assert said["epsilon"] == fitted.epsilon
    assert said["seeded"] is True
    assert [m["name"] for m in said["measurements"]] == ["histogram", "gram"]
    certificate = certify(fitted.module, torch.tensor(x[:50]).float(), torch.tensor(y[:50]), maps=[fitted.bounding])
    assert certificate.radii.max() > 0
    other = fit_table(x, y, epsilon=3.0, delta=1e-5, num_classes=classes, steps=30, accountant="rdp", seed=0)
    assert torch.equal(other.logits(x), fitted.logits(x))


def test_fit_table_refuses_what_is_no_table():
    x, y = table()
    given = {"epsilon": 1.0, "delta": 1e-5, "num_classes": 2}
    for bad_x, bad_y in ((x[0], y), (x, y[:-1]), (x, y.astype(float))):
        with pytest.raises(DataError, match="give"):
            fit_table(bad_x, bad_y, **given)
    for bad in ({"num_classes": 1}, {"class_weight": [1.0]}, {"bounds": 3.0}):
        with pytest.raises(ParameterError):
            fit_table(x, y, **{**given, **bad})
    for bad in ({"epsilon": -1.0}, {"epsilon": math.nan}, {"epsilon": "1"}, {"delta": 2.0}, {"delta": math.nan}):
        with pytest.raises(ParameterError, match=f"{next(iter(bad))}=.* is needed"):
            fit_table(x, y, **{**given, **bad})
    with pytest.raises(ParameterError, match="takes tables"):
        lipdp.models.build("tabular", input_shape=(1, 8, 8), num_classes=2)
    with pytest.raises(ParameterError, match="input_bound"):
        lipdp.models.build("tabular", input_shape=(8,), num_classes=2, input_bound=1.0)
    with pytest.raises(ParameterError, match="finite"):
        TableFeatures(2).set_(1.0, torch.full((2, BINS + 1), math.nan))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    conditioner = table_recipe.Preconditioner(optimizer, nn.Parameter(torch.zeros(1, 3)))
    with pytest.raises(CheckpointError, match="another model"):
        conditioner.load_state_dict({"matrix": torch.eye(2)})


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    x, y = table(500)
    np.savez(tmp_path / "table.npz", X=x, y=y)
    return str(tmp_path / "table.npz")


def run_config(path, **given):
    settings = {"noise_multiplier": 10.0, "steps": 6, "accountant": "rdp", "seed": 0, "checkpoint_every": 1, **given}
    return configure(dataset=path, **settings)


def test_tables_get_the_recipe_by_default(path, tmp_path):
    assert is_table(path)
    assert not is_table(str(tmp_path / "none.npz"))
    assert configure(dataset=path).model == "tabular"
    assert configure(dataset=path, epochs=3).steps is None
    assert configure(dataset=path, bounding="rescale").bounding_options == {}
    np.savez(tmp_path / "images.npz", X=np.zeros((4, 8, 8)), y=np.zeros(4))
    assert configure(dataset=str(tmp_path / "images.npz")).model == "mlp"
    (tmp_path / "stored").mkdir()
    np.save(tmp_path / "stored" / "train_x.npy", np.zeros((4, 3)))
    assert configure(dataset=str(tmp_path / "stored")).model == "tabular"


class Stop(Monitor):
    def __init__(self, at):
        self.at = at

    def step(self, step, loss, epsilon):
        if step == self.at:
            raise KeyboardInterrupt


def test_a_run_is_resumed_with_its_map_and_preconditioner(path, tmp_path, capsys):
    whole = Trainer(run_config(path), out=tmp_path / "whole")
    whole.run()
    said = json.loads((tmp_path / "whole" / "privacy.json").read_text())
    assert said["steps"] == said["planned_steps"] == 6
    expected = get_accountant("rdp").epsilon(whole.engine.plan.events, said["delta"]).epsilon
    assert said["epsilon"] == pytest.approx(expected)
    with pytest.raises(KeyboardInterrupt):
        Trainer(run_config(path), out=tmp_path / "cut", monitor=Stop(4)).run()
    half = json.loads((tmp_path / "cut" / "privacy.json").read_text())
    measured = get_accountant("rdp").epsilon(whole.engine.plan.events[:2], said["delta"]).epsilon
    assert measured < half["epsilon"] < said["epsilon"]
    resumed = Trainer.resume(tmp_path / "cut")
    resumed.run()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    again = json.loads((tmp_path / "cut" / "privacy.json").read_text())
    assert again["epsilon"] == said["epsilon"]
    assert again["steps_counted_again"] == 0
    loaded = load_run(tmp_path / "whole")
    assert torch.equal(loaded.model[0].values, whole.model[0].values)
    assert not torch.equal(loaded.model[0].values, TableFeatures(4).values)
    assert main(["certify", str(tmp_path / "whole"), "--radii", "0.001", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] >= found["certified_accuracy"][0]


def test_a_measurement_that_was_edited_is_refused(path, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Trainer(run_config(path), out=tmp_path / "cut", monitor=Stop(3)).run()
    file = tmp_path / "cut" / "privacy.json"
    said = json.loads(file.read_text())
    said["measurements"][0]["noise_multiplier"] *= 2
    file.write_text(json.dumps(said))
    with pytest.raises(ResumeError):
        Trainer.resume(tmp_path / "cut")


def test_the_header_and_the_report_say_what_is_measured(path, tmp_path, capsys):
    arguments = ["--noise-multiplier", "9", "--steps", "2", "--accountant", "rdp", "--out", str(tmp_path / "run")]
    assert main(["train", "--dataset", path, *arguments]) == 0
    header = " ".join(capsys.readouterr().out.split())
    assert "mapped by SignedLog(scale=0.01" in header
    assert "--bounding rescale" in header
    assert "histogram at σ" in header
    from lipdp.report.reading import read_run
    from lipdp.report.statement import recomputed_epsilon

    account = read_run(tmp_path / "run").account
    assert recomputed_epsilon(account) == pytest.approx(account.epsilon, rel=1e-6)


def test_public_ranges_need_no_histogram(path, tmp_path):
    given = {"bounding": "rescale", "bounding_options": {"lower": -200.0, "upper": 200.0}}
    trainer = Trainer(run_config(path, **given))
    trainer.run()
    assert trainer.engine.measured == ("gram",)


def test_measurements_are_not_taken_for_steps_where_an_older_checkpoint_lies(path, tmp_path):
    folder = tmp_path / "run"
    config = run_config(path, seed=None, log_every=100)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, out=folder, monitor=Stop(4)).run()
    shutil.copy(folder / "checkpoint.previous.pt", folder / "checkpoint.pt")  # of step 2, and 3 were released
    Trainer.resume(folder).run()
    said = json.loads((folder / "privacy.json").read_text())
    assert (said["steps"], said["steps_counted_again"]) == (7, 1)
