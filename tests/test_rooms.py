"""The rooms: each imports those above it only, has a façade without code, is packaged, and all its files are tested."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lipdp

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ORDER = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`.*?) \|", PAGE, re.M)]
ORDER[-1] += ["__main__", "__init__"]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
FILES = sorted([*(ROOT / "lipdp").rglob("*.py"), *(ROOT / "models").rglob("*.py")])


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "models" if parts[0] == "models" else parts[1].removesuffix(".py")


def imported(tree: ast.Module) -> list[tuple[int, str]]:
    """Line and room of every import of the library, those within functions too."""
    found = []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            names = [f"lipdp.{a.name}" for a in node.names] if module == "lipdp" else [module]
        found += [(node.lineno, n.split(".")[1]) for n in names if n.startswith("lipdp.")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_the_rooms_above_it_only(path):
    if path == ROOT / "lipdp" / "__init__.py":
        return
    own = LEVEL[room_of(path)]
    up = [(line, room) for line, room in imported(ast.parse(path.read_text())) if LEVEL.get(room, -1) > own]
    assert not up


def test_the_page_lists_every_room_once_and_no_other():
    listed = [room for rooms in ORDER for room in rooms]
    assert sorted(listed) == sorted({room_of(path) for path in FILES})


def test_an_arrow_up_is_seen():
    tree = ast.parse(
        "def f():\n    from lipdp.training import Trainer\nimport lipdp.bounds.rules\nfrom lipdp import nn"
    )
    assert imported(tree) == [(3, "bounds"), (4, "nn"), (2, "training")]


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_facade_holds_no_code(path):
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)
    assert all(isinstance(node, kinds) for node in ast.parse(path.read_text()).body)


def test_a_facade_offers_what_it_names_and_nothing_else():
    assert set(lipdp.__all__) <= set(dir(lipdp))
    assert all(getattr(lipdp, name) is not None for name in lipdp.__all__)
    with pytest.raises(AttributeError, match="module 'lipdp' has no attribute 'Engine'"):
        lipdp.Engine  # noqa: B018


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/[!g]*.py")], ids=str
)
def test_a_text_for_users_names_facades_only(path):
    text = path.read_text()
    assert not re.findall(r"^\s*from lipdp\.\w+\.\w+.*", text, re.M)
    assert not not_offered(text)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_message_names_facades_only(path):
    raised = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
    texts = (n.value for node in raised for n in ast.walk(node) if isinstance(n, ast.Constant))
    assert not [name for text in texts if isinstance(text, str) for name in not_offered(text)]


@pytest.mark.parametrize("room", sorted(lipdp._ROOMS.split()))
def test_a_public_docstring_names_facades_only(room):
    """The reference shows those of public names, their public methods included."""
    facade = getattr(lipdp, room)
    for name in getattr(facade, "__all__", ()):
        shown = getattr(facade, name)
        members = vars(shown).items() if isinstance(shown, type) else ()
        for text in (shown.__doc__, *(value.__doc__ for member, value in members if not member.startswith("_"))):
            assert not not_offered(text or ""), name


def not_offered(text: str) -> list[str]:
    """The names `lipdp.room.name` of a text that no façade offers: inner modules, and what there is not."""
    found = []
    for name in set(re.findall(r"(?<![/\w.])lipdp\.([a-z]\w*\.\w+)", text)):
        room, _, inner = name.partition(".")
        offered = getattr(lipdp, room)
        found += [name] if inner not in getattr(offered, "__all__", dir(offered)) else []
    return found


def test_a_name_that_no_facade_offers_is_seen():
    text = "`lipdp.privacy.QuantileGate`, `lipdp.privacy.gate.QuantileGate`, `lipdp.nn.Linear`"
    assert sorted(not_offered(text)) == ["nn.Linear", "privacy.gate"]


def test_all_packages_are_in_the_wheel():
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {p.parent.relative_to(ROOT) for p in FILES if p.name == "__init__.py"}
    found = {".".join(f.parts) if f.parts[0] == "lipdp" else "lipdp." + ".".join(f.parts) for f in folders}
    assert set(listed) == found


COVERS = {
    "test_accounting": "accounting/numerics accounting/prv_grid",
    "engine/test_refusals": "privacy/checks privacy/loss_check privacy/optimizers",
    "engine/test_order_of_use": "privacy/step_count",
    "engine/test_state_of_run": "privacy/engine",
    "test_any_loop": "passes/forward passes/step passes/sums privacy/hooks",
    "test_audit": "commands/bars audit/experiments audit/observe audit/run audit/statistics",
    "test_bad_records": "batches/reading privacy/loss_check",
    "test_banded": "privacy/correlated",
    "test_bounds": "bounds/sensitivity bounds/steps",
    "test_forms": "bounds/functions bounds/probe bounds/trace",
    "test_certify": "certify/certificate certify/network",
    "test_cli": "commands/account commands/lazily commands/options commands/plan commands/sensitivity commands/console"
    " commands/train",
    "test_compare": "comparison/plots",
    "test_cost": "commands/scale",
    "test_data": "data/opening data/sources",
    "test_distributed": "distributed/launch distributed/wrappers nn/sharded",
    "test_dynamics": "comparison/kernel",
    "test_estimators": "estimators/base estimators/classifier estimators/recipe estimators/regressor estimators/scaler"
    " estimators/scikit",
    "test_serving": "features/frozen serving/model serving/files commands/use",
    "test_everyday_losses": "losses/pixels",
    "test_everyday_layers": "bounds/convolution bounds/curves bounds/moving bounds/pooling",
    "test_features": "features/cosine features/energies features/maps",
    "test_guards": "passes/snapshot",
    "test_attention": "bounds/attention nn/attention",
    "test_layers": "nn/activation nn/conv nn/linear nn/normalization nn/plain nn/pooling nn/residual nn/shift"
    " nn/weight_gate",
    "test_losses": "losses/base losses/columns losses/criteria losses/labels losses/margin",
    "test_models": "models/cnn models/families models/linear models/mixer models/mlp models/registry models/resnet"
    " models/stages models/starts models/tabular models/transformer models/vgg",
    "test_records_people_bring": "batches/inputs",
    "test_unbounded": "bounds/steady",
    "test_tokens_and_weights": "bounds/lookups bounds/products bounds/refused bounds/weights",
    "test_plan": "accounting/plan_table",
    "test_planning": "planning/pictures planning/tan planning/workers",
    "test_opacus_probe": "comparison/trainers/probe",
    "test_port": "nn/rewrite nn/tracing nn/walk",
    "test_report": "report/comparison report/document report/evaluation report/figures report/pages report/parameters"
    " report/tensorboard",
    "test_rooms": "lazy",
    "test_runtime": "nn/autocast",
    "test_sampling": "batches/population",
    "test_simulation": "commands/simulate",
    "test_stored": "data/folders data/labels data/source",
    "test_table_files": "commands/schema",
    "test_image_folders": "data/imagefolder data/images",
    "test_suggestion": "privacy/attach privacy/complete privacy/options",
    "test_tables": "training/fitted",
    "test_testing": "testing/attack testing/case testing/loss testing/nodes",
    "test_trainers": "comparison/backprop_clipping comparison/trainers/clipping comparison/trainers/engine"
    " comparison/trainers/non_private comparison/trainers/registry",
    "test_training": "training/account training/environment training/monitor training/progress training/release"
    " training/resume training/trainer",
}
"""A test file → the files of the library that it runs, where no test is named after them or imports them."""


def test_every_file_has_a_test():
    tests = {path.relative_to(ROOT / "tests").with_suffix("").as_posix(): path for path in ROOT.glob("tests/**/*.py")}
    assert tests.keys() >= COVERS.keys()
    named = {name for names in COVERS.values() for name in names.split()}
    stems, text = {path.stem for path in tests.values()}, "\n".join(path.read_text() for path in tests.values())
    files = {str(p.relative_to(ROOT).with_suffix("")).removeprefix("lipdp/"): p for p in FILES if "__" not in p.stem}
    assert named <= files.keys()  # what is gone leaves the list

    def imported(name):
        room, _, stem = f"lipdp.{name}".replace("/", ".").rpartition(".")
        return re.search(rf"\b(from|import) {room}\.{stem}\b|\bfrom {room} import .*\b{stem}\b", text)

    untested = files.keys() - named - {name for name, p in files.items() if f"test_{p.stem}" in stems}
    assert not {name for name in untested if not imported(name)}
