"""One plan: what every command that trains prints and holds is what the engine executes; one file decides it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lipdp
from lipdp.accounting import PrivacyPlan, Relation, Subsampling
from lipdp.audit.run import many_runs, one_run
from lipdp.cli import main
from lipdp.comparison import tables as tables_module
from lipdp.comparison.configs import RobustnessConfig, SpeedConfig, TablesConfig, UtilityConfig
from lipdp.comparison.robustness import robustness
from lipdp.comparison.speed import speed
from lipdp.comparison.tables import tables
from lipdp.comparison.trainers.opacus import OpacusTrainer
from lipdp.comparison.utility import utility
from lipdp.data import load
from lipdp.errors import CalibrationError, EngineError, ParameterError, ResumeError, UnknownNameError
from lipdp.estimators import PrivateClassifier, PrivateRegressor
from lipdp.planning.simulation import Runner, simulation
from lipdp.privacy.engine import PrivacyEngine
from lipdp.training import Trainer, configure
from tests.worlds import scenarios
from tests.worlds.cluster import cluster

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
RECORDS, OWNERS = 320, 100
GIVEN = {"dataset_size": 1000, "expected_batch_size": 100, "steps": 30}
SHORT = {"model": "linear", "epsilon": 4.0, "batch_size": 40, "steps": 3, "accountant": "rdp"}
SETTINGS = {
    "records": {},
    "owners": {"owner_column": "user", "batch_size": 20},
    "fixed size": {"sampling": "fixed_size"},
    "owners of fixed number": {"owner_column": "user", "sampling": "fixed_size", "batch_size": 20},
    "views": {"augment": "flip", "views": 3},
    "owners with views": {"owner_column": "user", "augment": "flip", "views": 2, "batch_size": 20},
}


@pytest.fixture(scope="module")
def owned(tmp_path_factory):
    """320 digits of 100 owners, in an .npz."""
    split, owner = load("digits"), np.random.default_rng(0).integers(0, OWNERS, RECORDS)
    owner[:OWNERS] = np.arange(OWNERS)
    path = tmp_path_factory.mktemp("data") / "owned.npz"
    parts = {"X": split.train_x[:RECORDS], "y": split.train_y[:RECORDS], "X_test": split.test_x, "y_test": split.test_y}
    np.savez(path, **{name: part.numpy() for name, part in parts.items()}, user=owner)
    return str(path)


@pytest.fixture
def executed(monkeypatch):
    """What the engine then does, read where it does it: its sampler, and the noise and account of its steps."""
    found, ordinary = [], PrivacyEngine.make_private_with_plan

    def watched(engine, *arguments, **options):
        made = ordinary(engine, *arguments, **options)
        found.append(SimpleNamespace(engine=engine, plan=engine.plan, done=mechanism(engine)))
        return made

    monkeypatch.setattr(PrivacyEngine, "make_private_with_plan", watched)
    return found


def mechanism(engine):
    """(N, q, T, σ, relation, unit) of an engine, none of it read from its plan."""
    run = engine._hooks
    sampler, owners = run.loader.sampler, run.loader.owners
    deltas, stds = run._deltas_and_stds()
    moved = deltas > 0  # nothing comes back through a head of zeros
    sigma = float((deltas / stds)[moved].square().sum().rsqrt())  # of the noise that is drawn
    return {
        "dataset_size": sampler.population,
        "sampling_rate": sampler.sampling_rate,
        "steps": sampler.steps,
        "noise_multiplier": pytest.approx(sigma, rel=1e-9),
        "relation": sampler.relation,
        "unit": "record" if owners is None else "owner",
    }


def stated(plan):
    names = ("dataset_size", "sampling_rate", "steps", "noise_multiplier", "relation", "unit")
    return {name: plan[name] for name in names} if isinstance(plan, dict) else {n: getattr(plan, n) for n in names}


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "relation"), [("poisson", Relation.ADD_OR_REMOVE_ONE), ("fixed_size", Relation.REPLACE_ONE)]
)
def test_everything_follows_from_what_is_given(sampling, relation):
    plan = PrivacyPlan.of(
        **{**GIVEN, "steps": None}, epochs=3, sampling=sampling, target_epsilon=2.0, target_delta=1e-5
    )
    assert (plan.sampling_rate, plan.steps, plan.relation, plan.unit) == (0.1, 30, relation, "record")
    account = {"sampling_rate": 0.1, "steps": 30, "delta": 1e-5, "relation": relation}
    assert plan.noise_multiplier == lipdp.calibrate(target_epsilon=2.0, **account)
    spent = lipdp.epsilon(noise_multiplier=plan.noise_multiplier, **account)
    assert plan.predicted.epsilon == spent
    assert 1.99 <= spent <= 2.0
    assert lipdp.epsilon(noise_multiplier=0.95 * plan.noise_multiplier, **account) > 2.0
    assert (plan.step_event.steps, plan.event) == (1, plan.step_event.with_steps(30))
    assert PrivacyPlan.of(**GIVEN, noise_multiplier=plan.noise_multiplier, sampling=sampling).event == plan.event


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"expected_batch_size": 1001}, ParameterError, "1 … N = 1000"),
        ({"expected_batch_size": 0}, ParameterError, "expected_batch_size=0"),
        ({"expected_batch_size": 10.5}, ParameterError, "expected_batch_size=10.5"),
        ({"dataset_size": "many"}, ParameterError, "dataset_size='many'"),
        ({"steps": 0}, ParameterError, "steps=0"),
        ({"steps": True}, ParameterError, "steps=True"),
        ({"epochs": 3}, ParameterError, "give one of them"),
        ({"steps": None}, ParameterError, "give one of them"),
        ({"steps": None, "epochs": float("nan")}, ParameterError, "epochs=nan"),
        ({"sampling": "shuffled"}, UnknownNameError, "fixed_size"),
        ({"unit": "user"}, UnknownNameError, "owner"),
        ({"accountant": "gdp"}, UnknownNameError, "prv"),
        ({"noise_multiplier": 0.0}, ParameterError, "noise_multiplier"),
        ({"noise_multiplier": None}, ParameterError, "neither a noise multiplier nor a target"),
        ({"noise_multiplier": None, "target_epsilon": 1.0}, ParameterError, "neither a noise multiplier nor a target"),
        ({"noise_multiplier": None, "target_epsilon": 1e9, "target_delta": 1e-5}, CalibrationError, "too large"),
    ],
)
def test_what_makes_no_plan(changed, error, message):
    with pytest.raises(error, match=message):
        PrivacyPlan.of(**{**GIVEN, "noise_multiplier": 1.0, **changed})


def test_a_plan_without_a_delta_predicts_nothing():
    with pytest.raises(ParameterError, match="target_delta"):
        _ = PrivacyPlan(**GIVEN, noise_multiplier=1.0).predicted


def test_a_saved_plan_is_compared_in_all_that_it_states():
    plan = PrivacyPlan(**GIVEN, noise_multiplier=1.0)
    saved = json.loads(json.dumps(plan.as_dict()))
    plan.check_same(saved)
    for name, value in saved.items():
        with pytest.raises(ResumeError, match=f"{name} was"):
            plan.check_same({**saved, name: "other" if isinstance(value, str) else -1})
        with pytest.raises(ResumeError, match="another privacy plan"):
            plan.check_same({n: v for n, v in saved.items() if n != name} | {"more": 1})
    with pytest.raises(ResumeError, match="states no privacy plan"):
        plan.check_same(None)


def test_epochs_are_steps_times_the_rate():
    assert Subsampling.at(0.02, epochs=2).steps == 100
    assert Subsampling.of(1437, 256, epochs=0.01).steps == 1
    assert configure(batch_size=100, epochs=2).resolve(1437).steps == Subsampling.of(1437, 100, epochs=2).steps == 29


# --- the engine takes it ----------------------------------------------------------------------------------------------


def offered(plan, **options):
    split = load("digits")
    model = lipdp.models.build("linear", input_shape=split.input_shape, num_classes=10)
    engine = PrivacyEngine(options.pop("accountant", "prv"))
    engine.make_private_with_plan(
        plan,
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        criterion=lipdp.losses.TauCrossEntropy(8.0),
        dataset=torch.utils.data.TensorDataset(split.train_x[:1000], split.train_y[:1000]),
        **options,
    )
    return engine


def test_the_engine_executes_the_plan_it_is_given_and_names_the_rest():
    plan = PrivacyPlan(**GIVEN, noise_multiplier=1.5, target_delta=1e-5)
    engine = offered(plan, allocation="global", gate=0.3)
    assert mechanism(engine) == stated(plan)
    assert engine.plan == replace(plan, allocation="global", gate="norm 0.3 at most")


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        ({"unit": "owner"}, {}, "protects each owner, but batches would be drawn from records"),
        ({}, {"group": np.arange(1000) % 1000}, "protects each record, but batches would be drawn from owners"),
        ({"accountant": "rdp"}, {}, "the accountant 'rdp', but the engine has 'prv'"),
        ({"dataset_size": 2000, "sampling": "fixed_size"}, {}, "dataset_size=2000 but the dataset has 1000 records"),
    ],
)
def test_a_plan_for_another_run_is_refused(plan, options, message):
    with pytest.raises(ParameterError, match=message):
        offered(PrivacyPlan(**{**GIVEN, "noise_multiplier": 1.0, **plan}), **options)


# --- every command that trains ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_train(name, owned, executed, tmp_path, capsys):
    settings = {**SHORT, **SETTINGS[name], "dataset": owned}
    words = [w for n, v in settings.items() for w in (f"--{n.replace('_', '-')}", str(v))]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    (made,) = executed
    written = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert made.done == stated(made.plan) == stated(written)
    owners = "owner_column" in settings
    assert (made.plan.dataset_size, made.plan.unit) == ((OWNERS, "owner") if owners else (RECORDS, "record"))
    printed, plan = " ".join(capsys.readouterr().out.split()), made.plan
    for text in (
        f"each of {plan.dataset_size} {plan.unit}s ({plan.relation.words} {plan.unit})",
        f"T = {plan.steps} steps, B = {plan.expected_batch_size}, q = {plan.sampling_rate:.4g}",
        f"σ = {plan.noise_multiplier:.4g}",
        f"ε = {plan.predicted.epsilon:.4g} at δ = {plan.target_delta:g}",
    ):
        assert text in printed
    assert written["planned_epsilon"] == plan.predicted.epsilon == made.engine.get_epsilon(plan.target_delta)


@pytest.mark.parametrize("name", SETTINGS)
def test_simulate(name, owned, executed):
    """320 records of 100 owners: the noise is that of 100, in the simulation as in the full run."""
    settings = {**SHORT, **SETTINGS[name], "dataset": owned}
    given, split, bound = simulation(settings, scale=4.0)
    full = Trainer(configure(**given.full_settings({})))
    assert mechanism(full.engine) == stated(given.plan) == stated(full.engine.plan)
    assert full.planned == given.plan.predicted
    Runner(given, split, bound)({})
    assert executed[-1].done == stated(given.simulated) == stated(executed[-1].plan)
    assert given.plan.unit == given.simulated.unit == ("owner" if "owner_column" in settings else "record")
    assert given.as_dict()["full"].items() <= given.plan.as_dict().items()
    assert given.as_dict()["simulated"].items() <= replace(given.simulated, seeded=True).as_dict().items()
    if name == "owners":
        records = simulation({**settings, "owner_column": None}, scale=4.0)[0].plan
        assert given.plan.noise_multiplier > 1.3 * records.noise_multiplier


@pytest.mark.slow
def test_plan_simulate_prints_and_then_runs_one_plan(owned, executed, tmp_path, capsys):
    settings = {**SHORT, "dataset": owned, "batch_size": 20}
    named = {n: v for n, v in settings.items() if n != "accountant"}
    words = [w for n, v in named.items() for w in (f"--{n.replace('_', '-')}", str(v))]
    words += ["--option", "accountant=rdp", "--option", "owner_column=user", "--search", "lr=0.1:2:log", "--scale", "4"]
    assert main(["plan", "simulate", *words, "--trials", "1", "--run", "--out", str(tmp_path)]) == 0
    simulated, full = executed
    assert f"full run: {full.plan.summary}" in " ".join(capsys.readouterr().out.split())
    told = json.loads((tmp_path / "simulation.json").read_text())
    assert full.done == stated(told["full"]) == stated(full.plan)
    assert simulated.done == stated(told["simulated"]) == stated(simulated.plan)


def test_compare_utility(owned, executed):
    config = UtilityConfig(datasets=(owned,), model="linear", epsilons=(4.0,), trainers=("clipless",), seeds=1,
                           trials=2, batch_size=40, epochs=1.0, tune_scale=2)  # fmt: skip
    (cell,) = utility(config).cells
    *trials, final = executed
    for made in executed:
        assert made.done == stated(made.plan)
    plan = final.plan
    assert (plan.dataset_size, plan.expected_batch_size, plan.steps) == (RECORDS, 40, cell["steps"])
    assert (cell["batch_size"], cell["noise_multiplier"]) == (40, plan.noise_multiplier)
    assert (
        cell["epsilon"]
        == plan.predicted.epsilon
        == final.engine.accountant.epsilon([plan.event], cell["delta"]).epsilon
    )
    for made in trials:
        assert made.plan.expected_batch_size == round(20 * made.plan.dataset_size / RECORDS)
        assert made.plan.noise_multiplier == plan.noise_multiplier / 2


def test_compare_robustness(owned, executed):
    config = RobustnessConfig(dataset=owned, model="linear", epsilon=4.0, trainers=("clipless",), taus=(8.0,),
                              batch_size=40, epochs=1.0, samples=20)  # fmt: skip
    (cell,) = robustness(config).cells
    (made,) = executed
    plan = made.plan
    assert made.done == stated(plan)
    assert (cell["batch_size"], cell["steps"], cell["noise_multiplier"]) == (40, plan.steps, plan.noise_multiplier)
    assert cell["epsilon"] == plan.predicted.epsilon <= 4.0


def test_compare_speed(executed):
    """No cell states a plan but B; every private trainer of a batch size steps by one plan of it."""
    config = SpeedConfig(dataset="digits", model="linear", batch_sizes=(8, 16), repeat=1, memory=False,
                         trainers=("clipless", "backprop_clipping"))  # fmt: skip
    cells = speed(config).cells
    assert [cell["status"] for cell in cells] == ["measured"] * len(executed)
    for cell, made in zip(cells, executed, strict=True):
        assert made.done == stated(made.plan)
        assert (made.plan.expected_batch_size, made.plan.sampling_rate) == (cell["batch_size"], 0.5)


def test_compare_tables(owned, executed, monkeypatch, tmp_path):
    """lipdp's learner and Opacus' train within the cell's ε at its δ, on its records."""
    steps, ordinary, sessions = 5, OpacusTrainer.start, []
    monkeypatch.setattr(tables_module, "_OPACUS_STEPS", steps)
    monkeypatch.setattr(OpacusTrainer, "start", lambda *given: sessions.append(ordinary(*given)) or sessions[-1])
    with np.load(owned) as parts:
        np.savez(tmp_path / "flat.npz", X=parts["X"].reshape(len(parts["X"]), -1), y=parts["y"])
    config = TablesConfig(tables=(str(tmp_path / "flat.npz"),), trainers=("lipdp", "opacus_mlp"), seeds=1, records=200)
    ours, theirs = tables(config).cells
    (made,) = executed
    assert made.done == stated(made.plan)
    assert list(made.engine.ledger.events) == made.plan.events
    assert (made.plan.dataset_size, made.plan.unit) == (ours["records"], "record") == (160, "record")
    assert (made.plan.target_epsilon, made.plan.target_delta) == (ours["epsilon"], ours["delta"])
    assert made.engine.get_epsilon(ours["delta"]) == made.plan.predicted.epsilon <= ours["epsilon"]
    *trials, final = sessions
    assert trials
    assert {session.loader.sampler.population for session in trials} == {144}  # without the validation part
    assert {session.private.noise_multiplier for session in trials} == {final.private.noise_multiplier}
    sampler = final.loader.sampler
    assert (sampler.population, sampler.steps) == (theirs["records"], steps)
    account = {"sampling_rate": sampler.sampling_rate, "steps": steps, "delta": theirs["delta"]}
    assert lipdp.epsilon(noise_multiplier=final.private.noise_multiplier, **account) <= theirs["epsilon"]


@pytest.mark.parametrize("given", [{}, {"bounds": None}, {"hidden": 0}, {"hidden": 4}], ids=str)
@pytest.mark.parametrize("kind", [PrivateClassifier, PrivateRegressor])
def test_estimators(kind, given, executed):
    x = np.random.default_rng(0).uniform(size=(200, 2))
    targets = {"target_bounds": (0, 2)} if kind is PrivateRegressor else {}
    fitted = kind(2.0, 1e-5, **{"bounds": (0, 1), **given}, **targets, steps=4)
    fitted.fit(x, x.sum(1) if targets else np.arange(200) % 2)
    (made,) = executed
    assert made.done == stated(made.plan) == stated(fitted.privacy_)
    assert list(made.engine.ledger.events) == made.plan.events
    assert (made.plan.dataset_size, made.plan.steps, made.plan.target_epsilon) == (200, 4, 2.0)
    assert 1.9 < fitted.epsilon_ == fitted.privacy_["epsilon"] == made.plan.predicted.epsilon <= 2.0
    assert f"noise multiplier {made.plan.noise_multiplier:.4g}, accountant {made.plan.accountant}" in " ".join(
        fitted.report().split()
    )


@pytest.mark.parametrize(("steps", "rate"), [(1, 1.0), (3, 0.25)])
def test_audits(steps, rate, executed):
    """The engine of `many_runs` takes the steps of all its runs; its plan is otherwise that of one."""
    result = many_runs(lipdp.audit.worst_case(steps=steps, sampling_rate=rate), epsilon=8.0, runs=40, seed=0)
    single = one_run(lipdp.audit.gradient_canaries(64, steps=steps, sampling_rate=rate), epsilon=8.0, seed=0)
    for made in executed:
        told, plan = single if made is executed[-1] else result, made.plan
        present = {"dataset_size": made.done["dataset_size"]}  # with the canaries or without: N is a constant
        assert made.done == {**stated(plan), **present}
        assert (told.noise_multiplier, told.sampling_rate) == (plan.noise_multiplier, plan.sampling_rate)
        assert (told.steps, plan.steps % steps) == (steps, 0)
        assert told.claimed_epsilon == replace(plan, steps=steps).predicted.epsilon <= 8.0
    assert executed[-1].plan.steps == steps


# --- several processes ------------------------------------------------------------------------------------------------


def processes(owned, name):
    """In one of several processes: what the trainer holds and what its engine does, after a step."""
    torch.set_num_threads(1)
    trainer = Trainer(configure(**SHORT | SETTINGS[name] | {"dataset": owned}))
    trainer.run()
    return stated(trainer.engine.plan), {n: v if n != "noise_multiplier" else v.expected
                                         for n, v in mechanism(trainer.engine).items()}  # fmt: skip


def own_records():
    """Two processes with 200 and 100 records: N = 300."""
    engine, *_ = scenarios.private(parts=[200, 100], sigma=2.0)
    return stated(engine.plan), engine._hooks.loader.sampler.population


@pytest.mark.slow
@pytest.mark.distributed
def test_several_processes_have_the_plan_of_one(owned, forks, tmp_path):
    with cluster(forks, 2, tmp_path) as two:
        for name in SETTINGS:
            alone = stated(Trainer(configure(**SHORT | SETTINGS[name] | {"dataset": owned})).engine.plan)
            for plan, done in two.run(processes, owned, name):
                assert plan == alone
                assert {**done, "noise_multiplier": pytest.approx(done["noise_multiplier"], rel=1e-9)} == plan
        for plan, population in two.run(own_records):
            assert (plan["dataset_size"], plan["sampling_rate"], population) == (300, scenarios.B / 300, 300)
        outcomes = two.outcomes(scenarios.facts_differ)
        assert {name for _, (name, *_) in outcomes} == {EngineError.__name__}


# --- one file decides -------------------------------------------------------------------------------------------------

HOME = "lipdp/accounting/plan.py"
DECISIONS = {
    "q": r"batch(_size)? / (\w+\.)*(dataset_size|records|population|size|units|len\()",
    "σ": r"import [\w, ]*\bcalibrate\b|accounting\.calibrate\(|lipdp\.calibrate\(",
    "the events of steps": r"(?<!\.)\bEvent\((?!\))",
    "the relation": r'"(poisson|fixed_size)": *Relation|Relation\.\w+ if|else Relation\.',
}
ALLOWED = {
    "q": {"lipdp/batches/samplers.py"},  # a sampler of a fixed size used by itself says its rate; it draws B, not q
    "the events of steps": {
        *(f"lipdp/accounting/{name}.py" for name in ("accountants", "calibration", "events")),  # of a q that is given
        "lipdp/report/statement.py",  # of what a run states: the claim is checked against another's arithmetic
    },
}


@pytest.mark.parametrize("what", DECISIONS)
def test_one_file_decides(what):
    found = set()
    for path in [*(ROOT / "lipdp").rglob("*.py"), *(ROOT / "models").rglob("*.py")]:
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
        found |= {str(path.relative_to(ROOT))} if re.search(DECISIONS[what], code) else set()
    assert found == {HOME} | ALLOWED.get(what, set())
