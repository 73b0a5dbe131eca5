"""The report: what it says of a run, that folders are not trusted, and how the page looks in a real browser."""

import importlib
import json
import math
import re
import shutil
import sys
from dataclasses import fields
from html.parser import HTMLParser
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch

from lipdp import cli
from lipdp.errors import CheckpointError, ParameterError, UnknownNameError
from lipdp.noise.allocation import get_allocation
from lipdp.noise.gaussian import GaussianNoise
from lipdp.report import gather, render
from lipdp.report.pages import at_most
from lipdp.report.reading import Account, Robustness
from lipdp.report.statement import best_guess
from lipdp.training import Monitor, Trainer, configure, train
from tests import browser as browsers

pytestmark = pytest.mark.usefixtures("one_thread")

EVIL = (
    "</td><script>alert(1)</script><img src=x onerror=alert(1)> $\\frac{ | `x` [a](javascript:alert(1)) \ud800 \u202e"
)
EVIL_NAME = EVIL.replace("\ud800", "")  # a field of that name is refused
MD_EVIL = "| a |\n\n# Injected <b>"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished private run, with a certificate and an audit."""
    folder = tmp_path_factory.mktemp("runs") / "private"
    options = {"depth": 1, "width": 16}
    train(configure(dataset="digits", model="mlp", model_options=options, steps=12, noise_multiplier=6.0), out=folder)
    points = {"radii": [0.0, 0.1, 0.2], "certified_accuracy": [0.8, 0.5, 0.1]}
    certificate = {
        "samples": 360, "accuracy": 0.8, "radii": [0.1, 0.2],
        "certified_accuracy": [0.5, 0.1], "attacked_accuracy": [0.7, 0.4],
        "lipschitz": 0.3, "method": "fourier", "weights": "model", "step": 12, "curve": points,
        "attack": {"attacked_at_own_radius": 300, "broken_at_own_radius": 0},
    }  # fmt: skip
    one = {"method": "one run", "experiment": "canaries", "trials": 9, "lower_bound": 0.7, "claimed_epsilon": 4.0}
    audit = {"claimed_epsilon": 4.0, "lower_bound": 0.7, "confidence": 0.95, "violated": False, "audits": [one]}
    (folder / "certificate.json").write_text(json.dumps(certificate))
    (folder / "audit.json").write_text(json.dumps(audit))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy to damage."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def comparison(tmp_path):
    of = {"model": "mlp", "dataset": "digits"}
    found = [("clipless", 1.0, 0.8), ("clipless", 3.0, 0.9), ("opacus_hooks", 1.0, 0.7), ("non_private", None, 0.97)]
    cells = [
        {**of, "trainer": trainer, "target_epsilon": e, "epsilon": e, "seed": seed, "accuracy": accuracy + seed / 100}
        for trainer, e, accuracy in found
        for seed in (0, 1)
    ]
    speed = {**of, "trainer": "clipless", "batch_size": 64, "step_seconds": 0.002, "peak_bytes": 2**20}
    path = tmp_path / "comparison"
    path.mkdir()
    (path / "results.json").write_text(json.dumps([*cells, speed]))
    return path


def edit(path, **changes):
    """Change a JSON file, digest and all where it has one."""
    from lipdp.accounting.digest import with_digest

    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(with_digest(values) if "digest" in values else values))


class Page(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).replace("\u00a0", " ").split())


def page_of(*runs, **options):
    return Page(render(gather(runs, **{"calibrate": False, **options}), "html"))


@pytest.fixture(scope="module")
def page(trained):
    """Of the run as it is."""
    return page_of(trained)


# -- what it says ------------------------------------------------------------------------------------------------------


def test_the_page_states_the_account_of_the_run(trained):
    page = page_of(trained, calibrate=True)
    account = json.loads((trained / "privacy.json").read_text())
    for text in (
        "≤ " + at_most(account["epsilon"], 3), f"δ = {account['delta']:g} (1 in 100,000)", "1,437", "PRV",
        "add or remove one record", "Noise multiplier σ 6 ", "its digest agrees", "Expected calibration error",
        "no cipher (numpy's on a CPU", "is at least 0.7",
        "consistent with the claim", "50.0 %", "succeeded on 0 of 300 records", "What ε does not cover", "torch 2",
        "pytest",
    ):  # fmt: skip
        assert text in page.words, text
    assert "NOT private" not in page.words
    assert sum(tag == "svg" for tag, _ in page.tags) == 5  # budget, accuracy, signal, reliability, robustness


def test_the_noise_shown_is_the_noise_drawn(tmp_path, monkeypatch):
    """Under a quantile gate each step has a bound of its own: what is computed after the last one is not its noise."""
    drawn, add = [], GaussianNoise.add_
    monkeypatch.setattr(
        GaussianNoise, "add_", lambda self, t, stds: (drawn.append(stds.tolist()), add(self, t, stds))[1]
    )
    options = {"dataset": "digits", "model": "mlp", "steps": 6, "noise_multiplier": 6.0, "lr": 2.0, "optimizer": "sgd"}
    trainer = Trainer(configure(**options, gate_quantile=0.5), out=tmp_path / "run")
    assert trainer.privacy()["noise_stds"] == {}
    trainer.run()
    account = json.loads((tmp_path / "run" / "privacy.json").read_text())
    steps = [stds for stds in drawn if len(stds) == len(account["sensitivity"])]  # the others are of the gate's count
    assert (len(steps), len(drawn)) == (6, 12)
    assert (
        account["noise_stds"]
        == trainer.engine.noise_stds()
        == dict(zip(account["sensitivity"], steps[-1], strict=True))
    )
    report = gather([tmp_path / "run"], calibrate=False).runs[0]
    assert {row.name: row.std for row in report.parameters} == account["noise_stds"]
    shown = " ".join(f"{row.std:.4g}" for row in report.parameters)
    assert all(std in page_of(tmp_path / "run").words for std in shown.split())
    deltas = torch.tensor(list(account["sensitivity"].values()), dtype=torch.float64)
    again = get_allocation(account["allocation"]).stds(deltas, torch.ones(len(deltas)), account["noise_multiplier"])
    assert not any(a == pytest.approx(b, rel=1e-3) for a, b in zip(again.tolist(), steps[-1], strict=True))


def test_a_resume_states_the_noise_of_the_step_it_goes_on_from(tmp_path):
    class Stop(Monitor):
        def step(self, step, loss, epsilon):
            if step == 3:
                raise RuntimeError("gone")

    options = {"steps": 6, "noise_multiplier": 6.0, "gate_quantile": 0.5, "lr": 2.0, "checkpoint_every": 1}
    config = configure(dataset="digits", model="linear", **options)
    with pytest.raises(RuntimeError, match="gone"):
        Trainer(config, out=tmp_path / "run", monitor=Stop()).run()
    account = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert account["steps"] == 2
    assert account["noise_stds"]
    trainer = Trainer.resume(tmp_path / "run")
    assert trainer.privacy()["noise_stds"] == account["noise_stds"] != trainer.engine.noise_stds()


def test_noise_and_signal_are_those_of_the_engine(tmp_path):
    for allocation, sampling in (("min_variance", "poisson"), ("per_layer", "fixed_size")):
        out = tmp_path / allocation
        trainer = Trainer(
            configure(
                dataset="digits", model="mlp", steps=2, noise_multiplier=6.0, allocation=allocation, sampling=sampling
            ),
            out=out,
        )
        trainer.run()
        report = gather([out], calibrate=False).runs[0]
        assert {row.name: row.std for row in report.parameters} == trainer.engine.noise_stds()
        assert sum(row.share for row in report.parameters) == pytest.approx(1.0)
        row = report.parameters[0]
        assert row.signal == pytest.approx(trainer.batch_size * row.delta / (row.std * math.sqrt(row.size)))
        assert report.recomputed == pytest.approx(report.run.account.epsilon, rel=1e-3)


def test_best_guess_is_the_optimum_of_the_two_error_constraints():
    for epsilon, delta in ((0.0, 0.0), (0.5, 1e-5), (1.0, 0.1), (3.0, 1e-3)):
        alpha = torch.linspace(0, 1, 200_001, dtype=torch.float64)
        beta = torch.maximum(1 - delta - math.exp(epsilon) * alpha, math.exp(-epsilon) * (1 - delta - alpha)).clamp(
            min=0
        )
        best = float((1 - (alpha + beta) / 2).max())
        assert best_guess(epsilon, delta) == pytest.approx(best, abs=1e-4)
        assert best_guess(epsilon, delta) >= best - 1e-12


def test_a_seeded_run_is_called_not_private_loudly(folder):
    edit(folder / "privacy.json", seeded=True)
    page = page_of(folder)
    assert page.words.index("This run is NOT private") < page.words.index(
        "Privacy statement (does not hold, see above)"
    )
    assert any("alarm" in attrs.get("class", "") for _, attrs in page.tags)
    report = gather([folder], calibrate=False)
    assert json.loads(render(report, "json"))["runs"][0]["private"] is False
    assert "**THIS RUN IS NOT PRIVATE.**" in render(report, "md")


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({"epsilon": 0.5}, "ε is larger than claimed"),
        ({"delta": 0.1}, "δ is too large"),
        ({"planned_steps": 100}, "The run is not finished"),
        ({"steps_counted_again": 2, "planned_steps": 10}, "Some steps are counted twice"),
        ({"noise_multiplier": 0.0}, "ε could not be checked"),
        ({"accountant_note": "prv failed"}, "Another accountant answered"),
    ],
)
def test_what_is_wrong_with_an_account_is_said(folder, page, changes, title):
    assert title not in page.words
    edit(folder / "privacy.json", **changes)
    assert title in page_of(folder).words


def test_an_edited_account_a_refuted_claim_and_a_stale_certificate_are_said(folder):
    text = (folder / "privacy.json").read_text()
    (folder / "privacy.json").write_text(text.replace('"accountant_note": ""', '"accountant_note": "trust me"'))
    edit(folder / "audit.json", lower_bound=4.5)
    edit(folder / "certificate.json", step=5)
    words = page_of(folder).words
    for title in ("was changed after it was written", "An audit refutes the claim", "radii are of other weights"):
        assert title in words


def test_runs_side_by_side_and_what_differs(trained, folder, comparison):
    edit(folder / "config.json", lr=0.125)
    report = gather([trained, folder], calibrate=False, comparison=comparison)
    assert report.differences() == [("lr", [json.loads((trained / "config.json").read_text())["lr"], 0.125])]
    page = Page(render(report, "html"))
    for text in ("Side by side", "0.125", "A: private", "B: run", "80.5 % ± 0.71", "opacus_hooks", "2 1 Words"):
        assert text in page.words, text
    assert "mathdefault" not in page.words  # of a logarithmic axis
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert [row.mean for row in report.comparison if row.epsilon == 1.0] == pytest.approx([0.805, 0.705])


def test_two_sentences_come_first_and_hold(trained, folder, page):
    account, words = json.loads((trained / "privacy.json").read_text()), page.words
    assert len(set(re.findall(r"right at most ([\d.]+)", words))) == 1
    guess = float(re.search(r"trained on is right at most ([\d.]+) % of the time", words).group(1)) / 100
    exact = best_guess(account["epsilon"], account["delta"])
    assert exact <= guess < exact + 0.002
    places = [words.index(t) for t in ("was among the 1,437 that it", "of the test records", "Privacy statement")]
    assert places == sorted(places)
    edit(folder / "privacy.json", seeded=True)
    seeded = page_of(folder).words
    assert "Whoever studies this model" not in seeded
    assert "not assured: see the warning" in seeded


def test_an_attackers_reach_is_that_of_the_account(trained, page):
    account = json.loads((trained / "privacy.json").read_text())
    one = gather([trained], calibrate=False).runs[0]
    mu = account["steps"] ** 0.5 / account["noise_multiplier"]  # q = 1: the Gaussian mechanism
    for rate, bound in one.attack.tpr:
        exact = NormalDist().cdf(NormalDist().inv_cdf(rate) + mu)
        assert exact <= bound <= 1.005 * exact
    assert mu <= one.attack.mu <= 1.01 * mu
    assert one.nist[0][0] == "Unit of privacy"
    assert "NIST SP 800-226" in page.words


def test_what_is_missing_is_folded(folder):
    for name in ("audit.json", "certificate.json"):
        (folder / name).unlink(missing_ok=True)
    text = render(gather([folder], calibrate=False), "html")
    for what in ("Calibration", "Certified robustness", "Audit"):
        assert f'<details class="empty"><summary>{what}: not in this report</summary>' in text
        assert f">{what}</h2>" not in text


def test_answers_are_shown_as_the_run_wrote_them(tmp_path, folder):
    """Confusion matrix and ROC curve agree with the metrics of the run; damaged ones are named."""
    generator = np.random.default_rng(0)
    y = (generator.random(600) < 0.3).astype(int)
    np.savez(tmp_path / "toy.npz", X=(generator.normal(size=(600, 3)) + y[:, None]).astype("float32"), y=y)
    train(configure(dataset=str(tmp_path / "toy.npz"), noise_multiplier=6.0, steps=5), out=tmp_path / "table")
    last = json.loads((tmp_path / "table" / "metrics.jsonl").read_text().splitlines()[-1])
    written = json.loads((tmp_path / "table" / "evaluation.json").read_text())
    assert written["step"] == 5
    for weights, suffix in (("model", ""), ("ema", "_ema")):
        (negative, false), (missed, found) = written[weights]["confusion"]
        assert found / (missed + found) == last[f"test_recall{suffix}"]
        assert negative / (negative + false) == last[f"test_specificity{suffix}"]
        curve = written[weights]["roc"]
        area = np.trapezoid(curve["true_positive"], curve["false_positive"])
        assert area == pytest.approx(last[f"test_auroc{suffix}"], abs=2e-3)
    page = page_of(tmp_path / "table")
    for text in (
        f"{100 * last['test_base_rate']:.1f} % of the test records are positive", f"is 0 {negative} {false}",
        f"Average precision is {100 * last['test_average_precision']:.1f} %", "is 1",
    ):  # fmt: skip
        assert text in page.words, text
    assert "Average precision" in render(gather([tmp_path / "table"], calibrate=False), "md")
    edit(folder / "evaluation.json", ema={"confusion": [[1, 2]]})
    with pytest.raises(CheckpointError, match=r"evaluation\.json is damaged: a confusion matrix has as many columns"):
        gather([folder], calibrate=False)
    (folder / "evaluation.json").unlink()
    assert "Confusion matrix and ROC curve: not in this report" in page_of(folder).words


def test_json_is_plain_and_complete(trained):
    def refuse(name):
        raise AssertionError(name)

    plain = json.loads(render(gather([trained]), "json"), parse_constant=refuse)
    one = plain["runs"][0]
    assert one["private"] is True
    assert one["run"]["account"]["relation"] == "add_or_remove_one"
    assert one["calibration"]["records"] == 360
    assert one["run"]["config"]["model"] == "mlp"
    assert len(one["run"]["metrics"]) == 12


def test_markdown_is_a_section_of_a_model_card(trained):
    text = render(gather([trained], calibrate=False), "md")
    assert text.startswith("## Privacy\n")
    assert "| ε | " in text
    assert "```sh\n" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3, 5}


# -- folders are not trusted -------------------------------------------------------------------------------------------


def test_strings_of_a_folder_are_text_on_the_page_and_in_the_markdown(folder, comparison):
    edit(folder / "config.json", dataset=EVIL, features=EVIL, data_dir=EVIL, **{EVIL_NAME: MD_EVIL})
    edit(folder / "privacy.json", allocation="global", gate=EVIL, accountant_note=MD_EVIL, sensitivity={EVIL: 1.0})
    (folder / "environment.json").write_text(json.dumps([{"command": EVIL + "```\n# x", "lipdp": EVIL, EVIL: MD_EVIL}]))
    edit(folder / "audit.json", audits=[{"method": EVIL, "experiment": EVIL, "lower_bound": 1, "claimed_epsilon": 2}])
    cells = json.loads((comparison / "results.json").read_text())
    (comparison / "results.json").write_text(
        json.dumps([{**cell, "trainer": EVIL + cell["trainer"]} for cell in cells])
    )
    report = gather([folder], calibrate=True, comparison=comparison)
    page = Page(render(report, "html"))
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "object", "b")]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.words  # as text
    assert "Not computed" in page.words
    markdown = render(report, "md")
    assert "<script" not in markdown.replace("```sh\nlipdp", "").split("```")[0]
    assert "# Injected" not in re.findall(r"(?m)^.*", markdown)
    assert "\n# x" not in markdown
    assert "](javascript" not in markdown.split("```")[0]
    json.loads(render(report, "json"))


def test_a_model_of_its_own_code_is_not_built_unless_asked(folder, tmp_path, monkeypatch):
    (tmp_path / "trap_of_report.py").write_text("raise OSError('the trap was sprung')\n")
    monkeypatch.syspath_prepend(tmp_path)
    edit(folder / "config.json", model="trap_of_report:build")
    assert "add --run-code" in page_of(folder, calibrate=True).words
    assert "trap was sprung" in page_of(folder, calibrate=True, run_code=True).words


def test_the_page_asks_the_network_for_nothing(page):
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value.startswith(("#", "data:")), (tag, value)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "script-src" not in policy


FILES = ["config.json", "privacy.json", "metrics.jsonl", "evaluation.json", "certificate.json", "audit.json",
         "environment.json"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]\n",
        b'{"step": "x"}\n',
        b"\xff\xfe",
        b'{"epsilon": NaN}\n',
        b'{"\\ud800": 1}\n',
        b"[" * 100_000,
    ],
)
def test_damaged_files_are_named(folder, name, content, capsys):
    (folder / name).write_bytes(content)
    no_record = name == "metrics.jsonl" and content == b""
    strange_object = name == "config.json" and content in (b'{"step": "x"}\n', b'{"epsilon": NaN}\n')
    code, error = cli.main(["report", str(folder), "--no-calibration"]), capsys.readouterr().err
    assert code == (cli.DONE if no_record or strange_object else cli.REFUSED)
    if code == cli.REFUSED:
        assert name in error
        assert error.count("\n") == 1
        assert len(error) < 500


HOSTILE = [
    "x",
    "\x1b[31m" * 100,
    None,
    True,
    -1,
    0.5,
    2**70,
    10**400,
    math.nan,
    math.inf,
    [],
    [[]],
    {},
    {"": -1},
    [-1, "x"],
]


READ = {
    "config.json": {"dataset", "model", "features"},
    "privacy.json": {field.name for field in fields(Account)} - {"intact"},
    "metrics.jsonl": {"step", "epsilon", "train_loss_not_private", "seconds", "test_accuracy", "test_accuracy_ema"},
    "evaluation.json": {"step", "model", "ema"},
    "certificate.json": {field.name for field in fields(Robustness)} - {"certified_auroc"},
    "audit.json": {"claimed_epsilon", "lower_bound", "confidence", "audits"},
    "environment.json": {"command", "started", "torch"},
}


@pytest.mark.parametrize("name", FILES)
def test_every_field_may_hold_anything(folder, name, monkeypatch):
    """A report, or one readable message that names the file: no traceback, and no string of the folder as it is."""
    monkeypatch.setattr("lipdp.report.document.recomputed_epsilon", lambda account: None)  # slow, and not read here
    for checkpoint in folder.glob("*.pt"):  # slow too
        checkpoint.unlink()
    path, refused = folder / name, {}
    plain = json.loads(path.read_text().splitlines()[0] if name == "metrics.jsonl" else path.read_text())
    inner = plain[0] if isinstance(plain, list) else plain
    for field in READ[name]:
        for value in HOSTILE:
            changed = {**inner, field: value}
            path.write_text(json.dumps([changed] if isinstance(plain, list) else changed))
            try:
                report = gather([folder], calibrate=False)
            except CheckpointError as error:
                refused[field, repr(value)] = str(error)
            else:
                json.loads(render(report, "json"))
                render(report, "md")
    assert {field for field, _ in refused} == READ[name]
    for message in refused.values():
        assert name in message
        assert message.isprintable()
        assert len(message) < 500


def test_without_msgspec_the_message_says_what_to_install(folder, monkeypatch, capsys):
    for module in ("document", "reading", "comparison"):
        monkeypatch.delitem(sys.modules, f"lipdp.report.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "msgspec", None)
    assert cli.main(["report", str(folder)]) == cli.REFUSED
    assert 'pip install "lipdp[report]"' in capsys.readouterr().err
    importlib.import_module("lipdp.report.tensorboard")  # which reads nothing


def test_wrong_folders_and_options_are_refused(folder, tmp_path, capsys):
    for arguments in (
        [str(tmp_path / "nowhere")],
        [str(tmp_path)],
        [str(folder / "config.json")],
        [str(folder), "--comparison", str(folder)],
        [str(folder), "--format", "pdf"],
        [str(folder), "--out", str(tmp_path)],
    ):
        assert cli.main(["report", "--no-calibration", *arguments]) == cli.REFUSED
        assert capsys.readouterr().err.startswith("error: ")
    assert not (folder / "report.html").exists()
    with pytest.raises(ParameterError, match="13 runs"):
        gather([folder] * 13)
    with pytest.raises(UnknownNameError, match="html"):
        render(gather([folder], calibrate=False), "htm")
    edit(folder / "privacy.json", epsilon="x")
    with pytest.raises(
        CheckpointError, match=r"privacy\.json is damaged: Expected `float`, got `str` - at `\$\.epsilon`"
    ):
        gather([folder], calibrate=False)


def test_without_its_checkpoint_or_its_data_a_run_still_has_a_report(folder):
    for path in folder.glob("*.pt"):
        path.unlink()
    words = page_of(folder, calibrate=True).words
    assert "The numbers of weights are not shown" in words
    assert "Not computed" in words
    std = next(iter(json.loads((folder / "privacy.json").read_text())["noise_stds"].values()))
    assert f" {std:.4g} " in words
    edit(folder / "privacy.json", noise_stds={})
    assert "The noise is not shown" in page_of(folder).words


def test_the_command_writes_whole_files_and_prints_the_others(folder, tmp_path, capsys):
    assert cli.main(["report", str(folder), "--no-calibration"]) == cli.DONE
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (
        cli.main(["report", str(folder), "--no-calibration", "--format", "json", "--out", str(tmp_path / "r.json")])
        == 0
    )
    assert json.loads((tmp_path / "r.json").read_text())["version"]
    capsys.readouterr()
    assert cli.main(["report", str(folder), "--no-calibration", "--format", "md"]) == cli.DONE
    assert capsys.readouterr().out.startswith("## Privacy")
    assert not list(folder.glob("*.tmp"))


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def test_tensorboard_holds_the_curves_of_the_run(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    out = tmp_path / "run"
    arguments = ["--steps", "6", "--noise-multiplier", "6", "--log-every", "3", "--out", str(out), "--tensorboard"]
    assert cli.main(["train", "--model", "linear", *arguments]) == cli.DONE
    assert (out / "tensorboard").stat().st_mode & 0o077 == 0
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epsilons = [(e.step, e.value) for e in events.Scalars("privacy/epsilon")]
    assert epsilons == [(r["step"], pytest.approx(r["epsilon"], rel=1e-6)) for r in records]
    assert [e.step for e in events.Scalars("not_private/train_loss")] == [1, 2, 3, 4, 5, 6]
    report = gather([out], calibrate=False).runs[0]
    row = report.parameters[0]
    assert len(report.parameters) == 1
    assert events.Scalars("noise/largest_signal")[-1].value == pytest.approx(row.signal, rel=1e-4)
    assert 0 <= events.Scalars("noise/gradient_to_noise")[-1].value < 1.5 * row.signal
    assert events.Scalars("robustness/median_certified_radius")[-1].value >= 0


# -- in a real browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    why = browsers.missing()
    if why:
        pytest.skip(why)
    with browsers.browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture(scope="module")
def pages(trained, tmp_path_factory):
    """One run with everything; two runs, one of them seeded, with a comparison."""
    out = tmp_path_factory.mktemp("pages")
    seeded = shutil.copytree(trained, out / "a-seeded-run-with-quite-a-long-name-for-a-telephone")
    edit(seeded / "privacy.json", seeded=True)
    edit(seeded / "config.json", lr=0.125, model_options={"widths": list(range(100))})
    cells = [
        {"trainer": "clipless", "model": "mlp", "dataset": "digits", "target_epsilon": e, "accuracy": 0.5 + e / 9}
        for e in (1, 3)
    ]
    (out / "results.json").write_text(json.dumps(cells))
    (out / "one.html").write_text(render(gather([trained]), "html"))
    (out / "two.html").write_text(render(gather([trained, seeded], comparison=out), "html"))
    return {"one": out / "one.html", "two": out / "two.html"}


@pytest.mark.parametrize(("name", "size"), [("one", browsers.DESKTOP), ("two", browsers.PHONE)], ids=["one", "two"])
def test_the_page_can_be_read(chromium, pages, name, size):
    chromium.open(pages[name], size=size)
    assert chromium.log() == []
    assert chromium.run("return document.documentElement.scrollWidth") <= size[0]
    boxes = chromium.run(
        "return [...document.querySelectorAll('svg')].map(s => { const b = s.getBoundingClientRect();"
        " return [b.left, b.right, b.height, s.querySelectorAll('path').length] })"
    )
    assert len(boxes) == {"one": 5, "two": 7}[name]  # the options of B build no model: no reliability
    for left, right, height, paths in boxes:
        assert 0 <= left < left + 250 < right <= size[0]
        assert height > 60
        assert paths > 5
    smallest = chromium.run(
        "return Math.min(...[...document.querySelectorAll('p, td, th, li, dd, dt, small, figcaption, code')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 12
    letters = chromium.run(
        "return Math.min(...[...document.querySelectorAll('svg text')].map(t =>"
        " parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b)))"
    )
    assert letters >= 9.5
    assert chromium.run("return performance.getEntriesByType('resource').length") == 0


@pytest.mark.parametrize(("name", "scheme"), [("one", "dark"), ("two", "light")])
def test_the_page_is_accessible_in_both_colour_schemes(chromium, pages, name, scheme):
    chromium.open(pages[name], scheme=scheme)
    paper, ink, label = chromium.run(
        "const t = document.querySelector('svg text'), s = getComputedStyle(document.body);"
        " return [s.backgroundColor, s.color, getComputedStyle(t).fill]"
    )
    assert (_brightness(paper) > 0.9) == (scheme == "light")
    assert abs(_brightness(paper) - _brightness(ink)) > 0.6
    assert abs(_brightness(paper) - _brightness(label)) > 0.6  # the figures follow
    levels = chromium.run("return [...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    labels = chromium.run("return [...document.querySelectorAll('svg')].map(s => s.getAttribute('aria-label'))")
    assert all(len(label) > 20 for label in labels)
    findings = chromium.axe()  # not even a moderate one
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in findings] == []


def test_the_page_prints_on_light_paper_and_shows_its_alarm(chromium, pages):
    chromium.open(pages["two"], scheme="dark", media="print")
    assert _brightness(chromium.run("return getComputedStyle(document.body).backgroundColor")) > 0.9
    assert chromium.pdf().startswith(b"%PDF")
    chromium.open(pages["two"], size=browsers.PHONE)
    top = chromium.run("return document.querySelector('.alarm').getBoundingClientRect().top")
    assert 0 < top < browsers.PHONE[1]  # on the first screen of a telephone


def _brightness(colour):
    red, green, blue = (float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
