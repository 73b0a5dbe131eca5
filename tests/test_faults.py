"""What can happen to a run: killed at any moment, damaged files, a full disk, a folder that may not be written.

The claims: a resume always works and ends with the bits of a run that was left alone; no step whose release somebody
may have seen is missing in `privacy.json`; every other fault is one message, exit code 2, and the last good files
untouched.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import zipfile

import pytest
import torch
from faults.client import assert_same, records, released_and_counted, saved
from kit import Raises, refusal

import lipdp
from lipdp.accounting.digest import with_digest
from lipdp.batches.reading import TensorRecords
from lipdp.cli import main
from lipdp.errors import CheckpointError, DataError, FinishedError, ResumeError
from lipdp.training import Trainer, configure
from lipdp.training.checkpoint import RunFolder
from lipdp.training.monitor import Interrupted

pytestmark = pytest.mark.usefixtures("one_thread")  # as the killed processes: other threads sum in another order

NET = ["--model", "mlp", "--model-option", "depth=1", "--model-option", "width=8", "--batch-size", "128"]
HOW = ["--optimizer", "adam", "--schedule", "cosine", "--gate-quantile", "0.5", "--accountant", "rdp", "--threads", "1"]
QUICK = {"model": "linear", "batch_size": 128, "noise_multiplier": 2.0, "accountant": "rdp", "steps": 12}


def settings(steps, seed=0, every=2):
    """A tiny run with every kind of state: moments, averages, schedule, gate, metrics out of step with checkpoints."""
    plan = ["--steps", steps, "--noise-multiplier", "2", "--checkpoint-every", every, "--log-every", "3"]
    return ["train", *NET, *HOW, *plan, *([] if seed is None else ["--seed", seed])]


def go_on(commands, folder, given, **fault):
    """One process: the run begun, or resumed once `config.json` is there. Its answer, and whether the run ended."""
    begun = (folder / "config.json").exists()
    answer = commands(*(["train", "--resume", folder] if begun else [*given, "--out", folder]), **fault)
    if answer["signal"] is not None:
        return answer, False
    finished = answer["code"] == 2 and "is finished" in answer["output"]  # killed between the last file and the end
    assert answer["code"] == 0 or finished, answer["output"]
    return answer, True


def survive(commands, folder, given, faults):
    """Kill a run again and again until it ends; the number of kills. Whatever was seen stays counted."""
    seen, kills = 0, 0
    for fault in faults:
        answer, finished = go_on(commands, folder, given, **fault)
        if finished:
            return kills
        assert answer["signal"] == 9, answer
        kills += 1
        released, counted = released_and_counted(folder) if folder.exists() else (0, 0)
        seen = max(seen, released)
        assert counted >= seen, f"steps up to {seen} were seen, {counted} are counted"
    answer, finished = go_on(commands, folder, given)
    assert finished, answer
    return kills


def at_random(rng, seconds):
    while True:
        yield {"after": rng.uniform(0.0, seconds)}


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(commands, tmp_path_factory):
    """A run of 8 steps that nobody disturbed, and the calls by which it wrote its files."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    answer, _ = go_on(commands, folder, settings(8))
    return folder, answer


def test_killed_at_random_moments(commands, whole, tmp_path):
    folder, answer = whole
    rng, kills, runs = random.Random(7), 0, 0
    while kills < 3:
        runs += 1
        kills += survive(commands, tmp_path / f"{runs}", settings(8), at_random(rng, answer["seconds"]))
        assert_same(folder, tmp_path / f"{runs}")


def moments(calls, each):
    """Of the calls that wrote a run's files: every one that is no write, and every `each`-th write."""
    return [k for k, letter in enumerate(calls) if letter != "w" or k % each == 0]


def test_killed_in_the_middle_of_a_checkpoint(commands, whole, tmp_path):
    """Half a file written; before the flush, the link, the renaming; after it; while the keys are taken out."""
    folder, answer = whole
    chosen = random.Random(3).sample(moments(answer["calls"], 20), 2)
    last = len(answer["calls"]) - 1
    for k in (*chosen, answer["calls"].index("l"), last):
        assert survive(commands, tmp_path / f"{k}", settings(8), [{"at": k}]) == 1
        assert_same(folder, tmp_path / f"{k}")


@pytest.mark.slow
def test_killed_in_every_call_that_writes(commands, whole, tmp_path):
    folder, answer = whole
    for k in moments(answer["calls"], 10):
        assert survive(commands, tmp_path / f"{k}", settings(8), [{"at": k}]) == 1
        assert_same(folder, tmp_path / f"{k}")
        shutil.rmtree(tmp_path / f"{k}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, None])
def test_killed_two_hundred_times(seed, commands, tmp_path):
    """Half of them by the clock, half in the middle of writing; an unseeded run is compared with a copy of it."""
    rng, kills, runs = random.Random(11), 0, 0
    given = settings(24, seed)
    start = tmp_path / "start"
    answer, _ = go_on(commands, start, given, at=300)  # after the checkpoint of step 0, which holds the keys
    whole = shutil.copytree(start, tmp_path / "whole")
    answer, _ = go_on(commands, whole, given)

    def faults():
        clock = at_random(rng, answer["seconds"])
        while True:
            yield next(clock)
            yield {"at": rng.randrange(len(answer["calls"]))}

    while kills < 200:
        runs += 1
        folder = shutil.copytree(start, tmp_path / f"{runs}")
        kills += survive(commands, folder, given, faults())
        assert_same(whole, folder)
        shutil.rmtree(folder)
    print(f"seed {seed}: {kills} kills in {runs} runs survived")


# --- what was seen and then lost --------------------------------------------------------------------------------------


def stop(step):
    """Ends the process, as far as the run can tell, after a step."""
    return Raises(step, RuntimeError("gone"))


def begun(folder, *, step=8, **changes):
    config = configure(**{**QUICK, "checkpoint_every": 2, "log_every": 3, **changes})
    with pytest.raises(RuntimeError, match="gone"):
        Trainer(config, out=folder, monitor=stop(step)).run()
    return folder


def epsilon_of(steps):
    return lipdp.epsilon(noise_multiplier=2.0, sampling_rate=128 / 1437, steps=steps, delta=1e-5, accountant="rdp")


def keys(checkpoint):
    engine = checkpoint["resume"]["engine"]
    return engine["noise"]["key"], engine["loader"]["ratchet"]["key"]


def test_a_released_step_whose_checkpoint_is_lost_is_counted_again_with_other_noise(tmp_path, caplog):
    folder = begun(tmp_path / "run")  # checkpoints at 0, 2, 3, 4, 6, metrics of 3 and 6
    previous = torch.load(folder / "checkpoint.previous.pt", weights_only=True)
    assert (previous["step"], saved(folder)["step"]) == (4, 6)
    (folder / "checkpoint.pt").write_bytes(b"")
    trainer = Trainer.resume(folder, monitor=stop(6))
    assert trainer.step == 4
    assert "2 steps were released and lost" in caplog.text
    with pytest.raises(RuntimeError, match="gone"):
        trainer.run()
    now, privacy = saved(folder), json.loads((folder / "privacy.json").read_text())
    assert now["step"] == 4
    assert not set(keys(now)) & set(
        keys(previous)
    )  # other noise and other batches: a second release, and it is counted
    assert (privacy["steps"], privacy["steps_counted_again"]) == (6, 2)
    result = Trainer.resume(folder).run()
    privacy = json.loads((folder / "privacy.json").read_text())
    assert (privacy["steps"], privacy["planned_steps"], privacy["steps_counted_again"]) == (14, 12, 2)
    assert result.epsilon == privacy["epsilon"] == privacy["planned_epsilon"] == records(folder)[-1]["epsilon"]
    assert result.epsilon == epsilon_of(14) > epsilon_of(12)
    assert [record["epsilon"] >= epsilon_of(record["step"] + 2) for record in records(folder)[-2:]] == [True, True]


@pytest.mark.parametrize("log_every", [3, 100])
def test_an_older_checkpoint_in_the_place_of_the_newest_is_counted_again(tmp_path, log_every):
    folder = begun(tmp_path / "run", log_every=log_every)  # metrics that go as far as the newest, or not
    shutil.copy(folder / "checkpoint.previous.pt", folder / "checkpoint.pt")
    for _ in range(2):  # the count is on disk before the first step
        with pytest.raises(RuntimeError, match="gone"):
            Trainer.resume(folder, monitor=stop(5)).run()
        assert json.loads((folder / "privacy.json").read_text())["steps"] == 6
    Trainer.resume(folder).run()
    assert json.loads((folder / "privacy.json").read_text())["steps"] == 14


def resumed(folder, *, until=None):
    """The run gone on with, killed after a step; what `privacy.json` counts."""
    trainer = Trainer.resume(folder, monitor=None if until is None else stop(until))
    with contextlib.nullcontext() if until is None else pytest.raises(RuntimeError, match="gone"):
        trainer.run()
    return json.loads((folder / "privacy.json").read_text())["steps"]


def test_the_same_checkpoint_put_back_twice_loses_the_steps_of_both_times(tmp_path):
    folder = begun(tmp_path / "run", log_every=100)  # released 6 steps
    old = shutil.copy(folder / "checkpoint.previous.pt", tmp_path / "old.pt")  # of step 4
    shutil.copy(old, folder / "checkpoint.pt")
    assert resumed(folder, until=9) == 6 + 4  # 5 to 8
    shutil.copy(old, folder / "checkpoint.pt")
    assert resumed(folder) == 6 + 4 + 8  # 5 to 12


@pytest.mark.parametrize("previous", ["older too", "gone"])
def test_an_older_checkpoint_is_seen_whatever_is_beside_it(tmp_path, previous):
    folder = begun(tmp_path / "run", step=5, log_every=100)
    old = shutil.copytree(folder, tmp_path / "old")  # 4, and before it 2
    assert resumed(folder, until=9) == 8
    shutil.copy(old / "checkpoint.pt", folder)
    if previous == "gone":
        (folder / "checkpoint.previous.pt").unlink()
    else:
        shutil.copy(old / "checkpoint.previous.pt", folder)
    assert resumed(folder) == 8 + 8


def test_a_step_that_nobody_saw_is_taken_again_and_counted_once(tmp_path):
    folder = begun(tmp_path / "run", step=8)  # steps 7 and 8 were drawn, and are in no file
    Trainer.resume(folder).run()
    privacy = json.loads((folder / "privacy.json").read_text())
    assert (privacy["steps"], privacy["steps_counted_again"]) == (12, 0)
    assert privacy["epsilon"] == epsilon_of(12)


def test_stopped_between_the_pieces_of_a_batch_a_run_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    """The signal ends the processes that read as well: the batch is drawn, and cannot be read to its end."""
    trainer = Trainer(configure(**QUICK, microbatch=16, checkpoint_every=2, log_every=3), out=tmp_path / "run")
    read = TensorRecords.__getitem__

    def cut_short(self, drawn):
        if (trainer.step, trainer.loader.position) == (5, 6):
            os.kill(os.getpid(), signal.SIGTERM)
            raise DataError("a process that reads records ended")
        return read(self, drawn)

    monkeypatch.setattr(TensorRecords, "__getitem__", cut_short)
    with pytest.raises(Interrupted):
        trainer.run()
    monkeypatch.undo()
    trainer = Trainer.resume(tmp_path / "run")
    assert trainer.step == 4
    assert trainer.run().epsilon == epsilon_of(12)


def test_with_a_seed_the_draws_are_the_same_whatever_was_lost(tmp_path):
    Trainer(configure(**QUICK, checkpoint_every=2, log_every=3, seed=1), out=tmp_path / "whole").run()
    folder = begun(tmp_path / "run", seed=1)
    (folder / "checkpoint.pt").write_bytes(b"")
    Trainer.resume(folder).run()
    assert_same(tmp_path / "whole", folder)


def test_the_files_of_a_killed_process_do_not_outlive_the_run(commands, tmp_path):
    """A half-written checkpoint holds keys; whoever publishes the folder of a finished run publishes none."""
    calls = go_on(commands, tmp_path / "whole", settings(8))[0]["calls"]
    renamed = calls.index("l") - 2  # the second checkpoint is written, and not yet in place
    go_on(commands, tmp_path / "run", settings(8), at=renamed)
    stale = list((tmp_path / "run").glob("*.tmp"))
    assert any(b"ratchet" in path.read_bytes() for path in stale)
    go_on(commands, tmp_path / "run", settings(8))
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_what_was_half_written_goes_whatever_file_it_was_to_be(commands, whole, tmp_path):
    folder = RunFolder(shutil.copytree(whole[0], tmp_path / "run"))
    for path in list(folder.path.iterdir()):
        path.with_name(f"{path.name}.1.tmp").touch()
    with pytest.raises(FinishedError):
        Trainer.resume(folder.path)
    assert_same(whole[0], folder.path)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    trainer = Trainer(configure(**QUICK, seed=0), out=tmp_path / "run")
    assert [path.name for path in trainer.folder.path.iterdir()] == ["config.json"]
    del trainer
    assert Trainer.resume(tmp_path / "run").run().steps == 12
    Trainer(configure(**QUICK, seed=0), out=tmp_path / "whole").run()
    assert_same(tmp_path / "whole", tmp_path / "run")


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    return begun(tmp_path_factory.mktemp("interrupted") / "run", seed=0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that `interrupted` is the beginning of."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    Trainer(configure(**QUICK, checkpoint_every=2, log_every=3, seed=0), out=folder).run()
    return folder


@pytest.fixture
def run(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def same(one, other):
    """Whether two checkpoints hold the same, tensor by tensor."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def flip_and_read(run, positions, rng):
    """Flip a bit at each position; how many of the files were refused. The others must hold what was saved."""
    good, path = (run / "checkpoint.pt").read_bytes(), run / "checkpoint.pt"
    (run / "checkpoint.previous.pt").unlink(missing_ok=True)
    expected, refused = RunFolder(run).load(), 0
    for position in positions:
        bad = bytearray(good)
        bad[position] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            read = RunFolder(run).load()
        except CheckpointError:
            refused += 1
        else:
            assert same(read, expected), f"a bit flipped at {position} of {len(good)} was read as a checkpoint"
    path.write_bytes(good)
    return refused


def payload(run):
    """The positions of the tensors in the file: a flip there is a changed weight."""
    positions = []
    with zipfile.ZipFile(run / "checkpoint.pt") as archive:
        for info in archive.infolist():
            if "/data/" in info.filename:
                archive.fp.seek(info.header_offset + 26)
                start = info.header_offset + 30 + sum(int.from_bytes(archive.fp.read(2), "little") for _ in range(2))
                positions += range(start, start + info.file_size)
    return positions


def test_a_flipped_bit_is_never_read(run):
    rng = random.Random(1)
    weights = rng.sample(payload(run), 60)
    assert flip_and_read(run, weights, rng) == len(weights)
    anywhere = rng.sample(range((run / "checkpoint.pt").stat().st_size), 150)
    assert flip_and_read(run, anywhere, rng) > 75


@pytest.mark.slow
def test_no_flipped_bit_is_ever_read(run):
    rng = random.Random(2)
    assert flip_and_read(run, range((run / "checkpoint.pt").stat().st_size), rng) > 1000


def test_a_truncated_checkpoint_is_never_read(run):
    good = (run / "checkpoint.pt").read_bytes()
    for size in sorted({*random.Random(1).sample(range(len(good)), 60), 0, 1, len(good) - 1}):
        (run / "checkpoint.pt").write_bytes(good[:size])
        assert RunFolder(run).load()["step"] == 4, "the previous one"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_the_command_goes_on_from_the_previous_checkpoint_and_says_so(damage, run, undisturbed, capsys):
    path = run / "checkpoint.pt"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[payload(run)[40]] ^= 64
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": good[:-100], "flipped": bytes(flipped), "empty": b""}[damage])
    assert main(["train", "--resume", str(run)]) == 0
    assert "going on from checkpoint.previous.pt, of step 4" in capsys.readouterr().err
    assert_same(undisturbed, run)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(run):
    (run / "checkpoint.pt").write_bytes(b"damaged")
    folder = RunFolder(run)
    good = folder.load()
    folder.save({**good, "step": 5})
    assert torch.load(run / "checkpoint.previous.pt", weights_only=True)["step"] == 4
    folder.save({**good, "step": 6})
    assert torch.load(run / "checkpoint.previous.pt", weights_only=True)["step"] == 5


@pytest.mark.parametrize(
    "files",
    [
        {"checkpoint.pt": b"", "checkpoint.previous.pt": b""},
        {"checkpoint.pt": b"PK\x03\x04" + bytes(200), "checkpoint.previous.pt": bytes(999)},
        {"config.json": b"{"},
        {"config.json": b"\xff\xfe\x00"},
        {"config.json": b"null"},
        {"config.json": b'{"dataset": "digits", "steps": "ten"}'},
    ],
)
def test_what_cannot_be_resumed_is_one_message(files, run, capsys):
    for name, content in files.items():
        (run / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    refusal(["train", "--resume", run], capsys)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"steps": "x"}', None])
@pytest.mark.parametrize("name", ["privacy.json", "metrics.jsonl"])
def test_what_a_run_only_writes_may_be_lost(name, content, run, undisturbed):
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    Trainer.resume(run).run()
    assert_same(undisturbed, run)


def test_another_runs_account_is_refused(run):
    """Untouched, digest and all, but of a run with other noise."""
    privacy = json.loads((run / "privacy.json").read_text())
    (run / "privacy.json").write_text(json.dumps(with_digest({**privacy, "noise_multiplier": 2.1})))
    with pytest.raises(ResumeError, match="another privacy plan"):
        Trainer.resume(run)


# --- no code from files -----------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_runs_no_code(run, tmp_path):
    good = RunFolder(run).load()
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        torch.save({**good, "model": Payload(tmp_path / "owned")}, run / name)
    with pytest.raises(CheckpointError, match="damaged"):
        Trainer.resume(run)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (run / name).write_bytes(pickle.dumps({**dict.fromkeys(good), "model": Payload(tmp_path / "owned")}))
    with pytest.raises(CheckpointError, match="damaged"):
        Trainer.resume(run)
    assert not (tmp_path / "owned").exists()


# --- the disk ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder, *how):
    """A file system mounted on the folder, or a skip."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *how, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_message_and_space_is_all_it_takes(run, undisturbed, tmp_path, capsys):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=256k", "tmpfs") as disk:
        folder = shutil.copytree(run, disk / "run")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(bytes(1024)):
                pass
        message = refusal(["train", "--resume", folder], capsys)
        assert "No space left" in message
        for name in ("checkpoint.pt", "config.json"):
            assert (folder / name).read_bytes() == before[name]
        assert not list(folder.glob("*.tmp"))
        (disk / "ballast").unlink()
        assert main(["train", "--resume", str(folder)]) == 0
        assert_same(undisturbed, folder)


@pytest.mark.parametrize("kilobytes", [0, 4, 16, 24, 40])
def test_a_disk_that_fills_up_during_the_run(kilobytes, tmp_path, capsys):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=256k", "tmpfs") as disk:
        with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(bytes(1024)):
                pass
        os.truncate(disk / "ballast", max((disk / "ballast").stat().st_size - 1024 * kilobytes, 0))
        arguments = ["train", *settings(6)[1:], "--out", disk / "run"]
        assert "No space left" in refusal(arguments, capsys)
        assert not list(disk.glob("run/*.tmp"))
        (disk / "ballast").unlink()
        if (disk / "run" / "config.json").exists():
            arguments = ["train", "--resume", disk / "run"]
        assert main([str(a) for a in arguments]) == 0


def test_a_folder_that_may_not_be_written(run, tmp_path, capsys):
    with mounted(run, "-o", "bind,ro", str(run)):
        assert "Read-only" in refusal(["train", "--resume", run], capsys)
        assert "Read-only" in refusal(["train", *settings(6)[1:], "--out", run / "new"], capsys)
    assert main(["train", "--resume", str(run)]) == 0


def test_a_file_in_the_place_of_the_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(out) in refusal(["train", *settings(6)[1:], "--out", out], capsys)
        assert str(out) in refusal(["train", "--resume", out], capsys)


def test_a_folder_in_the_place_of_a_file(run, capsys):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (run / name).unlink()
        (run / name).mkdir()
    assert "checkpoint.pt" in refusal(["train", "--resume", run], capsys)


def test_a_disk_without_hard_links(run, undisturbed, monkeypatch):
    def refuse(*args, **options):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "link", refuse)
    Trainer.resume(run).run()
    assert_same(undisturbed, run)


def test_the_harness_notices_an_uncounted_step(run):
    """These tests can fail: an account that falls behind, metrics that run ahead, weights of another run."""
    privacy = json.loads((run / "privacy.json").read_text())
    (run / "privacy.json").write_text(json.dumps({**privacy, "epsilon": privacy["epsilon"] * 0.99}))
    with pytest.raises(AssertionError):
        released_and_counted(run)
    (run / "privacy.json").write_text(json.dumps(privacy))
    released, counted = released_and_counted(run)
    assert released == counted == 6
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"step": 6', '"step": 7'))
    with pytest.raises(AssertionError, match="no checkpoint holds"):
        released_and_counted(run)
    assert same({"a": [torch.ones(2), math.nan]}, {"a": [torch.ones(2), math.nan]})
    assert not same({"a": [torch.ones(2)]}, {"a": [torch.ones(2) * (1 + 1e-7)]})
