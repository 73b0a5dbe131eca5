"""docs/testing.md and examples/test_my_layer.py: the test kit as a user meets it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "test_my_layer.py"
GUIDE = (ROOT / "docs" / "testing.md").read_text()


def test_the_example_is_a_part_of_the_default_run(request):
    assert str(EXAMPLE.relative_to(ROOT)) in request.config.getini("testpaths")


def test_the_guide_shows_what_the_example_does():
    rule = re.search(r"@rule\(TokenBias\)\n.*?\n\n?```", GUIDE, re.S)
    assert rule is not None
    source = re.sub(r"  #.*", "", EXAMPLE.read_text())
    assert rule[0].removesuffix("```").strip() in source


def test_the_guide_names_what_there_is():
    import lipdp

    for name in set(re.findall(r"lipdp\.testing\.(\w+)", GUIDE)):
        assert hasattr(lipdp.testing, name)
    for path in re.findall(r"`((?:tests|examples)/[\w/.]+)`", GUIDE):
        assert (ROOT / path).exists()


def test_the_pitfalls_name_what_there_is():
    """Files, and words that stand for something in the code."""
    text = (ROOT / "docs" / "pitfalls.md").read_text()
    code = "\n".join(path.read_text() for path in (ROOT / "lipdp").rglob("*.py"))
    for path in re.findall(r"`((?:tests|lipdp)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`(?:\w+\.)?(\w+)(?:=|\(\))?`", text):
        assert re.search(rf"\b{name}\b", code), name
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Critical",
        "## Theoretical",
        "## Negligible",
    ]
