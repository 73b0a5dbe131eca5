"""Tables in CSV and Parquet files: what their schema declares is the map, and what it does not declare is refused."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

import lipdp
from lipdp import data
from lipdp.batches.records import NO_LABEL
from lipdp.cli import main
from lipdp.comparison.configs import UtilityConfig
from lipdp.data.columns import Category, Number
from lipdp.data.listed import ABSENT, OTHER, Listed
from lipdp.data.schema import Schema
from lipdp.data.split import held_out, split_off
from lipdp.errors import DataError, LipdpError, ParameterError, ResumeError
from lipdp.training import configure, train

pandas = pytest.importorskip("pandas")
pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMA = """
[columns]
age = {kind = "number", lower = 20, upper = 60}
work = {kind = "category", categories = ["private", "state"], other = true}
"hours a week" = {kind = "number", lower = 0, upper = 100, missing = 40, indicator = true}
id = {kind = "ignore"}
income = {kind = "label", classes = ["<=50K", ">50K"]}
"""


def frame(n=200):
    r = np.random.default_rng(0)
    age = r.integers(20, 60, n).astype(float)
    work = r.choice(["private", "state", "army"], n)
    income = np.where(age + r.normal(0, 5, n) > 40, ">50K", "<=50K")
    hours = np.where(np.arange(n) % 7 == 3, np.nan, r.integers(0, 99, n))
    return pandas.DataFrame({"age": age, "work": work, "hours a week": hours, "id": np.arange(n), "income": income})


@pytest.fixture
def files(tmp_path):
    (tmp_path / "columns.toml").write_text(SCHEMA)
    frame().to_csv(tmp_path / "people.csv", index=False)
    return tmp_path


def opened(path, schema=SCHEMA, owner=None):
    (path.parent / "said.toml").write_text(schema)
    plain = data.plain_schema(path.parent / "said.toml")
    return data.open_split(str(path), columns=data.Columns(owner=owner, schema=Schema.of(plain)))


def expected(table):
    """The rows by hand."""
    hours = table["hours a week"]
    return np.stack(
        [
            (table.age.clip(20, 60) - 40) / 20,
            table.work == "private",
            table.work == "state",
            ~table.work.isin(["private", "state"]),
            (hours.fillna(40) - 50) / 50,
            hours.isna(),
        ],
        axis=1,
    ).astype(np.float32)


@pytest.mark.parametrize("kind", ["csv", "semicolon", "tsv", "parquet"])
def test_the_rows_are_what_the_schema_declares(files, kind):
    path, table = files / f"t.{'csv' if kind == 'semicolon' else kind}", frame()
    table.loc[5, "age"], table.loc[6, "age"] = 1e9, -np.inf
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        table["work"] = table["work"].astype("category")
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep={"semicolon": ";", "tsv": "\t"}.get(kind, ","))
    split = opened(path)
    rows, labels = torch.from_numpy(expected(table)), torch.from_numpy((table.income == ">50K").to_numpy().astype(int))
    train_part, test_part = split_off(path, rows.numpy(), labels.numpy(), None)
    assert torch.allclose(split.train_x, rows[train_part], atol=1e-6)
    assert torch.allclose(split.test_x, rows[test_part], atol=1e-6)
    assert torch.equal(split.train_y, labels[train_part])
    assert (split.num_classes, split.task, split.input_shape) == (2, "binary", (6,))
    assert split.records + len(split.test_x) == 200
    assert 16 <= len(split.test_x) <= 64  # 40 are expected
    assert split.train_x.abs().max() <= 1


def test_a_folder_with_two_files_is_split_as_they_are(files):
    folder = files / "parts"
    folder.mkdir()
    frame(50).to_csv(folder / "train.csv", index=False)
    frame(20).to_csv(folder / "test.csv", index=False)
    plain = data.plain_schema(files / "columns.toml")
    split = data.open_split(str(folder), columns=data.Columns(schema=Schema.of(plain)))
    assert (split.records, len(split.test_x)) == (50, 20)
    assert data.is_table(str(folder))


def test_one_record_changes_its_own_row_alone_and_stops_nothing(files):
    """Whatever its cells hold: a label that is none has no loss."""
    clean = opened(files / "people.csv")
    lines = (files / "people.csv").read_text().splitlines()
    quotes = ('"20,private,3,4,>50K', '20,"private,3,4,>50K', 'a"b,"c,1,2,3', '"', '20,"a""')
    quotes += ('20,"private\nstate",3,4,>50K',)
    long = ("1,2\r3,4,5,6", "x" * 200_000, '"' + "x" * 200_000)
    for cells in (",,,,", "x,y,z,w,v", "nan,inf,1e999,,", "-inf,\ufffd,NaN,-,<=50K", "1", *quotes, *long):
        (files / "bad.csv").write_text("\n".join([lines[0], cells, *lines[1:]]))
        split = opened(files / "bad.csv")
        one, lines_of_it = split.records - clean.records, 1 + cells.count("\n")  # it comes first, on either side
        assert one + len(split.test_x) - len(clean.test_x) == lines_of_it
        assert torch.isfinite(split.train_x).all()
        assert split.train_x.abs().max() <= 1
        assert torch.equal(split.train_x[one:], clean.train_x)
        assert torch.equal(split.train_y[one:], clean.train_y)
        assert torch.equal(split.test_x[lines_of_it - one :], clean.test_x)
        assert split.train_y[0] in (0, 1, NO_LABEL)


@pytest.mark.parametrize("kinds", [2, 10**6], ids=["copies", "different"])
@pytest.mark.parametrize("place", [0, 700, 2000])
def test_one_record_more_moves_no_other_to_the_other_side(kinds, place):
    """As multisets of what records hold: which of two that hold the same is taken, no training can tell."""
    records = [str(number).encode() for number in np.random.default_rng(0).integers(0, kinds, 2000)]
    more = [*records[:place], b"1", *records[place:]]
    before, after = held_out(records), held_out(more)
    assert 1600 - 90 < (~before).sum() < 1600 + 90  # five standard deviations
    for side in (True, False):
        moved = Counter(itertools.compress(more, after == side))
        moved.subtract(itertools.compress(records, before == side))
        assert {count for count in moved.values() if count} <= {1}


def test_lists_know_their_values_in_every_form():
    assert Listed([1, 2])(["1", "2.0", 1.0, True, "?", None, "", float("nan")]).tolist() == [
        0, 1, 0, 0, OTHER, ABSENT, ABSENT, ABSENT,
    ]  # fmt: skip
    assert Listed(["1", "02"])([1, 1.0, "1", "02", "2"]).tolist() == [0, 0, 0, 1, OTHER]
    assert Listed([False, True])(["true", "False", True, np.bool_(False), "1"]).tolist() == [1, 0, 1, 0, OTHER]
    assert Listed(["NA", "b"])(["NA", " b "]).tolist() == [0, 1]
    for values in ([], [1, 1.0], ["a", "a "], [True, "true"], [None], [float("nan")], "ab", None, 3):
        with pytest.raises(ParameterError, match="a list of different texts or numbers is needed"):
            Listed(values)


def test_what_is_missing_follows_the_public_rule():
    assert Number("n", 0, 10).encode(["", None, "NA", "?"]).tolist() == [[0.0]] * 4
    assert Number("n", 0, 10, missing=10).encode([None, 5]).tolist() == [[1.0], [0.0]]
    assert Number("n", missing=-3).encode([None, 7]).tolist() == [[-3.0], [7.0]]
    made = Category("c", ["a", "b"], missing="b", other=True, indicator=True)
    assert made.encode([None, "a", "z"]).tolist() == [[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0]]
    assert made.inputs == ("c = a", "c = b", "c other", "c is missing")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"a table \[columns\] alone is needed"),
        ("[columns]\na = 3\n", r"the column 'a' is 3: \{kind = 'number' \| "),
        ("[columns]\na = {kind = 'numbr'}\n", "'number' | 'category' | 'label' | 'ignore'"),
        (
            "[columns]\na = {kind = 'number', uper = 3}\n",
            "has 'uper'; a column of kind 'number' takes lower, upper, missing, indicator",
        ),
        ("[columns]\na = {kind = 'number', lower = 3}\n", "only one of lower and upper"),
        ("[columns]\na = {kind = 'number', lower = 3, upper = 3}\n", "lower = 3, upper = 3: lower < upper is needed"),
        (
            "[columns]\na = {kind = 'number', lower = 0, upper = 3, missing = 4}\n",
            "missing = 4: a number from lower = 0 to upper = 3 is needed",
        ),
        ("[columns]\na = {kind = 'number', lower = 'x', upper = 3}\n", "are finite numbers"),
        ("[columns]\na = {kind = 'number', lower = -inf, upper = 3}\n", "are finite numbers"),
        ("[columns]\na = {kind = 'category'}\n", "'a': categories = .*a list of different"),
        ("[columns]\na = {kind = 'category', categories = ['x'], missing = 'y'}\n", "none of its categories"),
        ("[columns]\na = {kind = 'category', categories = ['x'], other = 1}\n", "are true or false"),
        ("[columns]\na = {kind = 'label'}\n", "classes = None: a list of different"),
        ("[columns]\na = {kind = 'label', classes = ['x']}\n", "two or more are needed"),
        ("[columns]\na = {kind = 'ignore', lower = 3}\n", "kind 'ignore' takes nothing else"),
        ("[columns]\na = {kind = 'number'}\n", "0 columns of kind 'label', one is needed"),
        ("[columns]\na = {kind = 'label', classes = [0, 1]}\n", "no column is a number or a category"),
        ("[columns\n", r"is no TOML \("),
    ],
)
def test_a_bad_schema_is_one_line_and_exit_code_2(tmp_path, capsys, text, says):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ParameterError, match=says) as raised:
        data.plain_schema(tmp_path / "c.toml")
    assert str(raised.value).count("\n") == 0
    assert "c.toml" in str(raised.value)
    assert main(["train", "--dataset", "x.csv", "--schema", str(tmp_path / "c.toml")]) == 2
    assert capsys.readouterr().err == f"error: {raised.value}\n"


def test_what_the_file_holds_and_the_schema_does_not_say_is_refused(files):
    path = files / "people.csv"
    changes = [
        (SCHEMA.replace("id =", "no ="), r"must name|has the columns 'id', of which the schema says nothing"),
        (SCHEMA.replace("age =", "years ="), "the header must name 'years' once; it has 'age'"),
        (SCHEMA.replace("<=50K", "poor").replace(">50K", "rich"), "three or more of the first 64 labels in 'income'"),
        (SCHEMA.replace('"private", "state"', '"Privat"'), "'work' has none of its categories 'Privat'"),
        (SCHEMA.replace('work = {kind = "category", categories = ["private", "state"], other = true}',
                        'work = {kind = "number"}'), "'work' holds no numbers: make it a category"),
    ]  # fmt: skip
    for schema, says in changes:
        with pytest.raises(DataError, match=says):
            opened(path, schema)
    lines = path.read_text().splitlines()
    (files / "bare.csv").write_text("\n".join(lines[1:]))
    with pytest.raises(DataError, match="has no header that names the columns 'age', 'work'") as raised:
        opened(files / "bare.csv")
    assert "private" not in str(raised.value)  # of a record nothing is shown
    (files / "ragged.csv").write_text("\n".join([lines[0], *(line + ",1" for line in lines[1:])]))
    with pytest.raises(DataError, match="another number of cells than the header's 5"):
        opened(files / "ragged.csv")
    lost = frame()
    lost.loc[3, "income"] = "unknown"
    (files / "parts").mkdir()
    for part in ("train", "test"):
        lost.to_csv(files / "parts" / f"{part}.csv", index=False)
    with pytest.raises(DataError, match="1 of 200 test records have no label of '<=50K', '>50K' in 'income'"):
        opened(files / "parts")
    for name, given, says in [
        (str(path), {}, "needs --schema FILE.toml .*lipdp schema"),
        ("digits", {"schema": SCHEMA}, "digits has no --schema to choose"),
        (str(files / "none.csv"), {"schema": SCHEMA}, "was not found|does not exist"),
    ]:
        columns = data.Columns(schema=Schema.of(data.plain_schema(files / "columns.toml")) if given else None)
        with pytest.raises(LipdpError, match=says):
            data.open_split(name, columns=columns, data_dir=files)


def test_owners_are_a_column(files):
    table = frame()
    table["id"] = table["hours a week"] = np.arange(200) // 4
    table.to_csv(files / "owned.csv", index=False)
    split = opened(files / "owned.csv", owner="id")
    owner, hours = split.train_owner.tolist(), (split.train_x[:, 4] * 50 + 50).round().tolist()
    assert len(set(zip(owner, hours, strict=True))) == len(set(owner)) == len(set(hours))
    table["id"] = table["id"].astype(object)
    table.loc[7, "id"] = None
    table.to_csv(files / "owned.csv", index=False)
    with pytest.raises(DataError, match="have no 'id'; fill it in"):
        opened(files / "owned.csv", owner="id")


SHORT = {"steps": 3, "noise_multiplier": 2.0, "accountant": "rdp", "seed": 0}


@pytest.fixture
def run(files):
    config = configure(dataset=str(files / "people.csv"), schema=files / "columns.toml", **SHORT)
    train(config, out=files / "run")
    (files / "columns.toml").unlink()  # the run's folder says it
    return files / "run"


def test_declared_ranges_stand_for_the_private_histogram(files, run):
    config = json.loads((run / "config.json").read_text())
    assert (config["model"], config["bounding"]) == ("tabular", "clip")
    measured = [one["name"] for one in json.loads((run / "privacy.json").read_text())["measurements"]]
    assert measured == ["gram"]
    half = SCHEMA.replace("lower = 20, upper = 60", "indicator = false")
    (files / "half.toml").write_text(half)
    settings = configure(dataset=str(files / "people.csv"), schema=files / "half.toml", **SHORT)
    assert settings.bounding == "signed-log"
    trained = train(settings, out=files / "half")
    measured = json.loads((trained.folder.path / "privacy.json").read_text())["measurements"]
    assert [one["name"] for one in measured] == ["histogram", "gram"]


def test_a_trained_model_reads_raw_tables_by_the_schema_of_its_run(files, run, capsys):
    model, table = lipdp.load(run), frame()
    assert model.classes == ("<=50K", ">50K")
    logits = model.logits(table)
    inner = torch.from_numpy(expected(table)).clamp(-1, 1)
    assert np.allclose(logits, model.network(inner).detach().numpy(), atol=1e-5)
    assert np.array_equal(model.logits({name: table[name].tolist() for name in table}), logits)
    assert np.array_equal(model.logits(table.drop(columns=["income", "id"])[::-1])[::-1], logits)
    with pytest.raises(DataError, match="give a DataFrame, or a mapping"):
        model.predict(inner.numpy())
    with pytest.raises(DataError, match="lacks the columns 'age'"):
        model.predict(table.drop(columns="age"))
    table.drop(columns="income").to_csv(files / "new.csv", index=False)
    assert main(["predict", str(run), str(files / "new.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "label,probability_<=50K,probability_>50K"
    assert [line.split(",")[0] for line in lines[1:]] == [model.classes[label] for label in model.predict(table)]
    assert main(["predict", str(run), str(files / "new.npy")]) == 2
    assert "trained on a table with a schema" in capsys.readouterr().err
    pytest.importorskip("safetensors")
    model.save_pretrained(files / "saved")
    assert np.array_equal(lipdp.load(files / "saved").logits(table), logits)


def test_a_simulation_takes_a_schema_and_names_it_in_its_command(files, capsys):
    out, schema = str(files / "search"), str(files / "columns.toml")
    command = ["plan", "simulate", "--dataset", str(files / "people.csv"), "--schema", schema, "--batch-size", "100"]
    command += ["--steps", "2", "--option", "noise_multiplier=4.0", "--scale", "2", "--search", "lr=0.1:2:log"]
    assert main([*command, "--trials", "1", "--out", out]) == 0
    assert f"--schema {schema}" in capsys.readouterr().out


def test_a_comparison_takes_a_schema(files):
    config = UtilityConfig(datasets=(str(files / "people.csv"),), schema=str(files / "columns.toml"))
    assert config.train_config(config.datasets[0]).schema == data.plain_schema(files / "columns.toml")


def test_a_run_keeps_its_schema(files):
    config = configure(dataset=str(files / "people.csv"), schema=files / "columns.toml", **SHORT)
    assert config.resumed({"schema": str(files / "columns.toml")}) == config
    (files / "columns.toml").write_text(SCHEMA.replace("upper = 60", "upper = 70"))
    with pytest.raises(ResumeError, match="schema was"):
        config.resumed({"schema": str(files / "columns.toml")})
    with pytest.raises(ParameterError, match="schema= and bounding= were both given"):
        configure(dataset="a.csv", schema=files / "columns.toml", bounding="tanh")
    with pytest.raises(ParameterError, match="schema= and classes= were both given"):
        configure(dataset="a.csv", schema=files / "columns.toml", classes=["a", "b"])


def test_a_dry_run_shows_the_map_of_the_columns(files, capsys):
    command = ["train", "--dataset", str(files / "people.csv"), "--schema", str(files / "columns.toml")]
    assert main([*command, "--dry-run", "--steps", "3", "--noise-multiplier", "2", "--accountant", "rdp"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in ("6 numbers of 3 columns", "age number, 20 to 60; missing as the middle 1", "others have an input 3",
                 "hours a week", "id ignored", "income label, '<=50K', '>50K'"):  # fmt: skip
        assert text in out


def test_a_template_holds_names_and_no_value(files, capsys):
    assert main(["schema", str(files / "people.csv")]) == 0
    text = capsys.readouterr().out
    assert '"hours a week" = {kind = "ignore"}' in text
    assert "army" not in text
    assert main(["schema", str(files / "people.csv"), "--out", str(files / "new.toml")]) == 0
    assert (files / "new.toml").read_text() == text
    assert main(["schema", str(files / "people.csv"), "--out", str(files / "new.toml")]) == 2
    with pytest.raises(ParameterError, match="0 columns of kind 'label'"):
        data.plain_schema(files / "new.toml")
    (files / "empty.csv").write_text("")
    assert main(["schema", str(files / "empty.csv")]) == 2
    assert "its first line must be a header" in " ".join(capsys.readouterr().err.split())
