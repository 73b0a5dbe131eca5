"""`lipdp compare`: sweeps that go on where they were killed, out-of-memory as a cell, pictures, messages."""

import gc
import json
import sys
import weakref
import xml.etree.ElementTree as ET
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("opacus")
from lipdp.cli import main
from lipdp.comparison import plots
from lipdp.comparison import speed as speed_module
from lipdp.comparison import tables as tables_module
from lipdp.comparison import utility as utility_module
from lipdp.comparison.configs import RobustnessConfig, SpeedConfig, TablesConfig, UtilityConfig
from lipdp.comparison.contenders import Contender, contenders
from lipdp.comparison.protocol import ladder
from lipdp.comparison.results import Results
from lipdp.comparison.speed import speed
from lipdp.comparison.tables import tables
from lipdp.comparison.trainers import TRAINERS, get_trainer, legend
from lipdp.comparison.tuning import proposal, winner
from lipdp.comparison.utility import summary, table, utility
from lipdp.errors import CheckpointError, LipdpError, ParameterError, ResumeError, UnknownNameError

pytestmark = pytest.mark.usefixtures("one_thread", "forks")

SMALL = SpeedConfig(dataset="digits", model="linear", batch_sizes=(8, 16), repeat=2, memory=False)
TWO = UtilityConfig(epochs=1, trials=2, seeds=2, epsilons=(3.0,), trainers=("clipless", "opacus_hooks"), model="linear")


# --- contenders ------------------------------------------------------------------------------------------------------


def test_every_trainer_has_a_row_for_every_kind_it_trains():
    found = contenders()
    assert {contender.trainer for contender in found} == set(TRAINERS.values())
    names = {(contender.trainer.name, contender.plain) for contender in found}
    assert ("clipless", True) not in names
    assert ("backprop_clipping", False) not in names
    assert {("opacus_ghost", True), ("opacus_ghost", False)} <= names
    with pytest.raises(ParameterError, match="none of clipless trains a plain"):
        contenders(["clipless"], ["plain"])
    with pytest.raises(ParameterError, match="kinds of model"):
        contenders([], ["convex"])


# --- speed -----------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_built_is_refused_before_its_speed_is_measured(tmp_path):
    for wrong in ({"model": "mlpp"}, {"model_options": {"widht": 3}}):
        with pytest.raises(LipdpError, match=r"unknown model 'mlpp'|no option 'widht'"):
            speed(replace(SMALL, **wrong), out=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_speed_measures_every_row_and_its_ratios(tmp_path):
    results = speed(replace(SMALL, batch_sizes=(8,)), out=str(tmp_path))
    cells = json.loads((tmp_path / "results.json").read_text())
    assert cells == results.cells
    assert len(cells) == len(contenders(SMALL.trainers))
    for cell in cells:
        assert cell["status"] == "measured"
        assert cell["step_seconds"] > 0
        assert cell["repetitions"] == 2
        if cell["trainer"] == "non_private":
            assert cell["ratio_to_non_private"] == 1.0
        assert "ratio_to_plain_non_private" in cell
    assert "| linear-twin | opacus_hooks |" in speed_module.table(results)


def test_views_are_measured_in_the_same_rounds(tmp_path):
    """Of every trainer a cell for each K, with its ratio to one view; ghost clipping is refused more than one."""
    few = replace(SMALL, batch_sizes=(8,), views=(4, 1), trainers=("non_private", "clipless", "opacus_ghost"))
    results = speed(few, out=str(tmp_path))
    for cell in results.cells:
        if cell["trainer"] == "opacus_ghost" and cell["views"] == 4:
            assert (cell["status"], "mean over 4 views" in cell["reason"]) == ("refused", True)
            continue
        assert cell["ratio_to_non_private"] > 0
        assert ("ratio_to_one_view" in cell) is (cell["views"] == 4)
    assert [c["views"] for c in results.find(trainer="clipless")] == [1, 4]
    assert "| model | trainer | B = 8 | B = 8, 4 views |" in speed_module.table(results)
    assert "× one view)" in speed_module.table(results)
    labels = [line.get_label() for line in plots.speed_figure(results).axes[0].get_lines()]
    assert {"clipless, linear", "clipless, linear, 4 views"} <= set(labels)
    with pytest.raises(ParameterError, match=r"views=\[0\]"):
        replace(SMALL, views=(0,))
    pytest.importorskip("msgspec")
    from lipdp.report.comparison import read_comparison

    trainers = {row.trainer for row in read_comparison(tmp_path)}
    assert {"clipless", "clipless, 4 views"} <= trainers


def test_a_batch_has_every_view_of_its_records():
    config = replace(SMALL, views=(3,))
    session = speed_module.start(config, Contender(get_trainer("non_private"), False), 16, views=3)
    x, y = next(iter(session.loader))
    assert len(x) == len(y) > 3
    assert torch.equal(x[0::3], x[2::3])
    assert torch.equal(y[0::3], y[1::3])
    session.close()


def test_what_fails_is_a_cell_and_the_others_are_measured(monkeypatch):
    def broken(self, model, task):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(type(get_trainer("opacus_hooks")), "start", broken)
    results = speed(replace(SMALL, batch_sizes=(8,), trainers=("clipless", "opacus_hooks")))
    assert {c["status"] for c in results.find(trainer="clipless")} == {"measured"}
    assert {c["reason"] for c in results.find(trainer="opacus_hooks")} == {"RuntimeError: no such kernel"}


def test_one_seed_has_no_spread_and_chance_is_no_learning():
    results = Results(None, config={})
    shared = {"dataset": "digits", "model": "cnn", "target_epsilon": 1.0, "epsilon": 1.0, "settings": {}, "chance": 0.1}
    for trainer, seed, accuracy in (("clipless", 0, 0.9), ("opacus_hooks", 0, 0.14), ("opacus_ghost", 0, 0.10)):
        results.add({**shared, "trainer": trainer, "seed": seed, "accuracy": accuracy})
    results.add({**shared, "trainer": "opacus_ghost", "seed": 1, "accuracy": 0.12})
    rows = table(summary(results))
    assert "| clipless | accuracy | 90.0 (one seed) |" in rows.replace("accuracy, %", "accuracy")
    assert "14.0 (one seed), did not learn |" in rows
    assert "11.0 ± 1.4, did not learn |" in rows


def test_the_legend_says_what_every_trainer_does():
    lines = legend(TRAINERS).splitlines()
    assert [line.split(":")[0] for line in lines] == list(TRAINERS)
    assert len({line.split(": ")[1] for line in lines}) == len(TRAINERS)


def test_speed_goes_on_where_it_was(tmp_path, monkeypatch):
    few = replace(SMALL, trainers=("non_private", "clipless"), kinds=("lipschitz",))
    speed(replace(few, batch_sizes=(8,)), out=str(tmp_path))
    before = json.loads((tmp_path / "results.json").read_text())
    measured = []
    times = speed_module._times
    monkeypatch.setattr(speed_module, "_times", lambda c, r, b: (measured.append(b), times(c, r, b))[1])
    speed(few, out=str(tmp_path))
    assert measured == [16]
    assert json.loads((tmp_path / "results.json").read_text())[: len(before)] == before
    with pytest.raises(ResumeError, match="repeat was 2, is now 3"):
        speed(replace(few, repeat=3), out=str(tmp_path))


def test_out_of_memory_is_a_cell(monkeypatch):
    """A trainer that asks for 64 GiB, in the middle of the repetitions: its row says so, the others are measured."""
    hooks = get_trainer("opacus_hooks")
    begin = type(hooks).start

    def greedy(self, model, task):
        session = begin(self, model, task)
        session.step = lambda x, y: torch.empty(2**44)
        return session

    monkeypatch.setattr(type(hooks), "start", greedy)
    results = speed(replace(SMALL, trainers=("clipless", "opacus_hooks", "opacus_ghost"), kinds=("lipschitz",)))
    states = {(c["trainer"], c["batch_size"]): c["status"] for c in results.cells}
    assert states["opacus_hooks", 8] == states["opacus_hooks", 16] == "out of memory"
    assert states["clipless", 16] == states["opacus_ghost", 16] == "measured"
    assert "out of memory" in speed_module.table(results)


def test_a_process_over_its_limit_is_out_of_memory_and_harms_nobody():
    """100 MiB are too few for B = 4096, enough for nothing else to be touched; 8 GiB are enough."""
    config = SpeedConfig(dataset="mnist", model="cnn", memory_limit=600 / 1024)
    assert speed_module.peak(config, Contender(get_trainer("opacus_hooks"), True), 4096)["status"] == "out of memory"
    small = speed_module.peak(replace(config, memory_limit=8.0), Contender(get_trainer("non_private"), True), 16)
    assert small["status"] == "measured"
    assert 50 * 2**20 < small["peak_bytes"] < 2 * 2**30


def test_peak_memory_sees_an_allocation():
    """Per-sample gradients of a batch of 1,024 through 118,016 weights are 461 MiB more than none."""
    config = SpeedConfig(dataset="mnist", model="mlp")
    base, hooks = (
        speed_module.peak(config, Contender(get_trainer(n), True), 1024) for n in ("non_private", "opacus_hooks")
    )
    assert hooks["peak_bytes"] - base["peak_bytes"] > 400 * 2**20


def test_a_refused_model_is_a_cell(monkeypatch):
    from lipdp.errors import UnsupportedLayerError

    def refuse(self, model, task):
        raise UnsupportedLayerError("no such layer")

    monkeypatch.setattr(type(get_trainer("opacus_ghost")), "start", refuse)
    cells = speed(replace(SMALL, trainers=("opacus_ghost",))).find(trainer="opacus_ghost")
    assert {c["status"] for c in cells} == {"refused"}
    assert cells[0]["reason"] == "no such layer"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_speed_on_cuda():
    cells = speed(replace(SMALL, device="cuda", memory=True)).cells
    assert all(c["status"] == "measured" and c["peak_bytes"] > 0 for c in cells)


# --- utility ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep that nothing disturbed: its results, its folder, and how many records each evaluation saw."""
    seen, evaluate, out = [], utility_module.evaluate, tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        counted = lambda m, x, y, **o: (seen.append(len(x)), evaluate(m, x, y, **o))[1]  # noqa: E731
        patch.setattr(utility_module, "evaluate", counted)
        return SimpleNamespace(results=utility(TWO, out=str(out)), out=out, seen=seen)


def test_utility_tunes_on_validation_and_tests_once(whole):
    results, seen = whole.results, whole.seen
    trials = json.loads((whole.out / "tuning.json").read_text())
    assert len(trials) == 3 * 2
    assert len(results.cells) == 3 * 2
    assert seen[:6] == [144] * 6  # a tenth of the 1,437 training records
    assert seen[6:] == [360] * 6  # the test part
    assert {frozenset(c["settings"]) for c in trials} == {frozenset({"lr", "gate"}), frozenset({"lr", "max_grad_norm"})}
    for cell in results.cells:
        mine = [t for t in trials if (t["trainer"], t["model"]) == (cell["trainer"], cell["model"])]
        assert cell["settings"] == max(mine, key=lambda t: t["score"])["settings"]
        assert 2.9 < cell["epsilon"] <= 3.0
        assert cell["private"] is False  # seeded
        assert 0 <= cell["ece"] <= 1
        assert {"trainer", "model", "dataset", "batch_size", "epsilon", "seed", "accuracy"} <= set(cell)
    assert all(0.1 <= cell["chance"] < 0.2 for cell in results.cells)
    means = {(c["trainer"], c["model"]): c for c in summary(results)}
    scores = [c["accuracy"] for c in results.find(trainer="clipless")]
    assert means["clipless", "linear"]["mean"] == pytest.approx(sum(scores) / 2)
    assert means["clipless", "linear"]["spread"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)


def test_trials_are_scaled():
    """B/k and σ/k: the same signal to noise at a k-th of the cost; the validation part leaves q as it is."""
    contender = contenders(["opacus_ghost"], ["plain"])[0]
    settings = (("max_grad_norm", 1.0), ("lr", 0.3))
    full = utility_module.run(TWO, utility_module.Job("digits", contender, 3.0, settings, 0, False))
    scaled = utility_module.run(
        replace(TWO, tune_scale=4), utility_module.Job("digits", contender, 3.0, settings, 0, True)
    )
    assert scaled["noise_multiplier"] == pytest.approx(full["noise_multiplier"] / 4)
    assert scaled["batch_size"] == pytest.approx(full["batch_size"] * 0.9 / 4, abs=1)
    assert scaled["steps"] == full["steps"]
    assert scaled["epsilon"] is None


def test_a_killed_sweep_goes_on_where_it_was(commands, whole, tmp_path):
    """SIGKILL in the middle; the cells that were there stay as they were, and the whole is as if never killed."""
    arguments = ["--model", "linear", "--epochs", "1", "--trials", "2", "--seeds", "2", "--epsilons", "3",
                 "--trainers", "clipless", "opacus_hooks"]  # fmt: skip
    killed = tmp_path / "killed"
    answer = commands("compare", "utility", *arguments, "--out", killed, files=(str(killed / "tuning.json"), 1))
    assert answer["signal"] == 9, answer["output"]
    before = json.loads((killed / "tuning.json").read_text())
    assert 1 <= len(before) < 12
    assert main(["compare", "utility", *arguments, "--out", str(killed)]) == 0
    for name in ("tuning.json", "results.json"):
        cells, expected = (json.loads((folder / name).read_text()) for folder in (killed, whole.out))
        assert [{**c, "seconds": 0} for c in cells] == [{**c, "seconds": 0} for c in expected]
    assert json.loads((killed / "tuning.json").read_text())[: len(before)] == before


def test_the_records_of_one_run_are_gone_before_the_next():
    class Session:
        """Holds itself, as sessions with hooks do."""

        def __init__(self):
            self.itself = self

    alive = []

    def run(job):
        assert all(session() is None for session in alive)
        alive.append(weakref.ref(Session()))
        return {"job": job}

    gc.disable()
    try:
        Results(None, config={}).fill(range(3), key=lambda job: {"job": job}, run=run, progress=print, total=3)
    finally:
        gc.enable()
    assert len(alive) == 3


def test_two_processes_find_the_same():
    key = lambda cells: sorted((c["trainer"], c["model"], c["seed"], c["accuracy"]) for c in cells)  # noqa: E731
    config = replace(TWO, trials=1, trainers=("clipless",))
    assert key(utility(config, jobs=2).cells) == key(utility(config).cells)


def test_a_learning_rate_that_explodes_is_the_worst_score(monkeypatch):
    monkeypatch.setattr(type(get_trainer("non_private")), "grid", {"lr": (0.3, 1e30)})
    results = utility(replace(TWO, trainers=("non_private",), kinds=("plain",), seeds=1))
    assert results.cells[0]["settings"] == {"lr": 0.3}


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.floats(-2.5, 2.5), st.floats(-2, 2)), st.floats(-0.3, 0.3), st.floats(0.5, 2))
def test_a_search_ends_in_the_interior(optimum, slope, stretch):
    """Of a hill some rungs from the middle: the winner has worse neighbours on all sides, none of the trials is better,
    and there were at most as many as a comparison allows."""
    grid = {"lr": ladder(1.0, 8), "max_grad_norm": ladder(0.3)}

    def score(chosen):
        a, b = (
            grid[name].index(value) - len(grid[name]) // 2 - best
            for (name, value), best in zip(chosen, optimum, strict=True)
        )
        return 1 - (a * a + 2 * slope * a * b * stretch**0.5 + stretch * b * b) / 1000

    tried = {}
    while not (tried and winner(grid, tried)[1]):
        chosen = proposal(grid, tried)
        tried[chosen] = score(chosen)
    assert len(tried) <= UtilityConfig().trials
    assert score(winner(grid, tried)[0]) == max(tried.values())


def test_a_search_where_nothing_is_learned_has_no_winner():
    grid, tried = {"lr": ladder(1.0, 2)}, {}
    while (chosen := proposal(grid, tried)) is not None:
        tried[chosen] = 0.1
    assert len(tried) == 5
    assert winner(grid, tried)[1] is False


@pytest.mark.parametrize("epsilons", [(1.0, 0.0), (-1.0,), (float("nan"),), (float("inf"),)], ids=str)
def test_budgets_out_of_range_are_refused_before_the_first_run(epsilons):
    for kind, further in ((UtilityConfig, {}), (TablesConfig, {"tables": ("t.npz",)})):
        with pytest.raises(ParameterError, match=f"epsilon={epsilons[-1]}: a finite number > 0"):
            kind(epsilons=epsilons, **further)
    with pytest.raises(ParameterError, match=f"epsilon={epsilons[-1]}: a finite number > 0"):
        RobustnessConfig(epsilon=epsilons[-1])


def test_no_trainer_wins_on_the_edge_of_its_grid(tmp_path):
    """Those that did (backpropagation clipping, both global clippings) end in the interior, after as many trials."""
    names = ("backprop_clipping", "global_scaled", "global")
    config = UtilityConfig(epochs=2, seeds=1, epsilons=(3.0,), trainers=names, kinds=("plain",), model="linear")
    results = utility(config, out=str(tmp_path))
    assert all(cell["interior"] for cell in results.cells)
    assert "on the edge" not in table(summary(results))
    trials = json.loads((tmp_path / "tuning.json").read_text())
    assert len({sum(t["trainer"] == name for t in trials) for name in names}) == 1
    scores = {cell["trainer"]: cell["accuracy"] for cell in results.cells}
    assert scores["global"] == pytest.approx(scores["global_scaled"], abs=0.01)  # at rates scaled by C/Z they are one
    assert min(scores.values()) > 0.5


def test_a_binary_table_gets_an_auroc(tmp_path):
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, 400)
    x = generator.normal(size=(400, 5)) + 2 * y[:, None]
    np.savez(tmp_path / "toy.npz", X=x.astype("float32"), y=y)
    config = UtilityConfig(datasets=(str(tmp_path / "toy.npz"),), model="tabular", epochs=4, trials=1, seeds=1,
                           epsilons=(3.0,), trainers=("clipless", "adaptive"))  # fmt: skip
    for cell in utility(config).cells:
        assert 0.5 < cell["auroc"] <= 1


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path):
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, 800)
    np.savez(tmp_path / "toy.npz", X=(generator.normal(size=(800, 3)) + 2 * y[:, None]).astype("float32"), y=y)
    return str(tmp_path / "toy.npz")


def test_tables_are_learned_by_everybody_on_the_same_records(toy, tmp_path, monkeypatch):
    pytest.importorskip("interpret.privacy")
    monkeypatch.setattr(tables_module, "_OPACUS_STEPS", 20)
    config = TablesConfig(tables=(toy,), epsilons=(3.0,), seeds=2, records=500)
    results = tables(config, out=str(tmp_path / "out"))
    assert [c["trainer"] for c in results.find(seed=1)] == ["lipdp", "opacus_mlp", "ebm", "logistic_regression"]
    assert len({c["base_rate"] for c in results.find(seed=0)}) == 1  # the same test records
    assert {c["records"] for c in results.cells} == {400}
    assert all(c["auroc"] > 0.8 and c["private"] is False for c in results.cells)
    assert {c["target_epsilon"] for c in results.find(trainer="logistic_regression")} == {None}
    monkeypatch.setattr(tables_module, "_run", None)  # nothing is left to run
    assert tables(config, out=str(tmp_path / "out")).cells == results.cells
    rows = tables_module.table(results).splitlines()
    assert rows[0] == "| table | ε | metric, % | lipdp | opacus_mlp | ebm | logistic_regression |"
    assert rows[2].startswith(f"| {toy} | 3 | auroc | ")
    assert " ± " in rows[2]
    assert rows[3].startswith("| mean | 3 |  | ")


def test_tables_of_several_classes_have_an_accuracy_and_no_ebm(tmp_path, capsys, monkeypatch):
    pytest.importorskip("interpret.privacy")
    monkeypatch.setattr(tables_module, "_OPACUS_STEPS", 10)
    generator = np.random.default_rng(0)
    y = generator.integers(0, 3, 600)
    x = generator.normal(size=(600, 3)) + 3 * np.eye(3)[y]
    np.savez(tmp_path / "three.npz", X=x.astype("float32"), y=y)
    arguments = ["--tables", str(tmp_path / "three.npz"), "--seeds", "1", "--epsilons", "3"]
    assert main(["compare", "tables", *arguments, "--trainers", "ebm", "opacus_mlp", "lipdp"]) == 0
    printed = capsys.readouterr().out
    assert "| 3 | accuracy | " in printed
    assert "lipdp: PrivateClassifier" in printed
    assert main(["compare", "tables", *arguments, "--trainers", "logistic_regression", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["mean"] > 0.8


def test_what_tables_lacks_is_said_in_one_message(toy, monkeypatch, capsys):
    for name in ("interpret", "interpret.privacy", "diffprivlib", "diffprivlib.models"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["compare", "tables", "--tables", toy, "--trainers", "ebm", "diffprivlib"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "ebm (" in error
    assert 'pip install "lipdp[comparison]"' in error
    assert "scikit-learn below 1.8" in error
    with pytest.raises(ParameterError, match="holds inputs of shape"):
        tables(TablesConfig(tables=("digits",), trainers=("lipdp",)))


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_tables_and_pictures(tmp_path, capsys):
    arguments = ["--dataset", "digits", "--model", "linear", "--batch-sizes", "8", "--repeat", "2", "--trainers",
                 "non_private", "clipless", "--kinds", "lipschitz"]  # fmt: skip
    assert main(["compare", "speed", *arguments, "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "| linear | clipless |" in output
    assert "MiB" in output
    for name in ("speed", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert ET.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")


def test_the_utility_command_draws_the_front(tmp_path, capsys):
    arguments = ["--model", "linear", "--epochs", "2", "--trials", "1", "--seeds", "1", "--epsilons", "1", "3",
                 "--trainers", "non_private", "clipless"]  # fmt: skip
    assert main(["compare", "utility", *arguments, "--out", str(tmp_path)]) == 0
    assert "| digits | linear | clipless | accuracy |" in capsys.readouterr().out
    assert ET.parse(tmp_path / "utility-digits.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed", "--dataset", "mnits"], "mnits"),
        (["speed", "--batch-sizes", "0"], "at least 1"),
        (["speed", "--trainers", "opacus"], "opacus_hooks"),
        (["speed", "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["speed", "--threads", "0"], "--threads 0: a whole number"),
        (["tables", "--tables", "nowhere.npz", "--trainers", "lipdp"], "nowhere.npz"),
        (["tables", "--tables", "nowhere.npz", "--trainers", "lipdb"], "lipdb"),
        (["tables", "--tables", "nowhere.npz", "--seeds", "0"], "--seeds 0"),
        (["speed", "--memory-limit", "nan"], "--memory-limit nan: a finite number > 0"),
        (["robustness", "--twin-lr", "-1"], "--twin-lr -1.0: a finite number > 0"),
        (["robustness", "--max-grad-norm", "nan"], "--max-grad-norm nan: a finite number > 0"),
        (["utility", "--trials", "0"], "--trials 0"),
        (["utility", "--seeds", "0"], "--seeds 0"),
        (["utility", "--jobs", "0"], "--jobs 0"),
        (["utility", "--kinds", "convex"], "kinds of model"),
        (["utility", "--datasets", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_what_a_user_can_get_wrong(arguments, message, capsys):
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_results_file_is_named(tmp_path):
    Results(str(tmp_path), config={}).add({"a": 1})
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"results\.json"):
        Results(str(tmp_path), config={})


def test_unknown_names():
    with pytest.raises(UnknownNameError):
        utility(replace(TWO, trainers=("clippless",)))
