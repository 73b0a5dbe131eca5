"""The search of hyper-parameters by simulated runs, kept in an Optuna study, and what the full run made of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from lipdp.accounting.plan import whole
from lipdp.errors import CheckpointError, ParameterError, ResumeError
from lipdp.files import read_json, write_json
from lipdp.planning.simulation import LABEL, Simulation, simulation
from lipdp.planning.space import Choice, Dimension, Scalar
from lipdp.planning.workers import outcome, workers
from lipdp.training.config import RUNTIME, configure

STUDY = "simulation-not-private"
Progress = Callable[[int, dict[str, Any], "Found"], None]


@dataclass(frozen=True)
class Found:
    """What a search has found so far: the records of the finished runs, by number."""

    simulation: Simulation
    trials: Mapping[int, Mapping[str, Any]]

    @property
    def best(self) -> Mapping[str, Any]:
        """The record of the best run; ParameterError where all diverged."""
        rated = [record for record in self.trials.values() if record["value"] is not None]
        if not rated:
            raise ParameterError("every simulated run diverged: search lower learning rates")
        return max(rated, key=lambda record: record["value"])

    @property
    def samples(self) -> int:
        """Records processed by the search."""
        return sum(record["samples"] for record in self.trials.values())

    def as_dict(self, *, out: str | None = None) -> dict[str, Any]:
        """What `result.json` holds."""
        best, full = self.best, self.simulation.plan.samples
        return {
            "label": LABEL,
            "private": False,
            "trials": len(self.trials),
            "diverged": sum(record["value"] is None for record in self.trials.values()),
            "best": dict(best["drawn"]),
            f"predicted_{self.simulation.metric}": best["value"],
            "prediction": "of the best simulated run, on the validation part, with averaged weights",
            "compute": {
                "samples_searched": self.samples,
                "samples_searched_at_full_size": full * len(self.trials),
                "samples_saved": full * len(self.trials) - self.samples,
                "samples_of_the_full_run": full,
                "ratio": self.simulation.saved,
                "seconds_searched": sum(record["seconds"] for record in self.trials.values()),
            },
            "command": self.simulation.command(best["drawn"], out=out),
            "not_covered": "the choice made by looking at simulated runs on the private records",
        }


def simulate(
    settings: Mapping[str, Any],
    space: Mapping[str, Dimension],
    *,
    out: str | os.PathLike[str],
    scale: float = 16.0,
    trials: int = 20,
    jobs: int = 1,
    validation: float = 0.1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Found:
    """Search hyper-parameters of a private run by runs at B/k and σ/k with the same T. **No run of it is private.**

    A search that was killed goes on where it was, trial by trial, when it is called again with the same arguments
    (`trials` and `jobs` may differ); with one job it then draws what it would have drawn.

    Args:
        settings: of the full run, as `lipdp.training.configure` takes them.
        space: name → `Range` or `Choice`, e.g. from `parse_space`. Choices alone are searched whole if `trials`
            suffice.
        out: the search's folder: simulation.json, study.db (Optuna, SQLite), trials/NUMBER.json, result.json.
        scale: k in [1, 128]; jobs: processes; validation: share of the training records; seed: of draws and runs.
        trials: how many runs in all.
        progress: told of every run that ended.

    Raises:
        ResumeError: the folder holds another search, or one that another process carries on.
        ParameterError: an argument out of range, or a setting that was refused.
        KeyboardInterrupt: SIGINT; what ended is kept.

    Source: Sander, Stock & Sablayrolles (2023), section 4; Akiba et al. (2019) for Optuna.
    """
    for name, value in (("trials", trials), ("jobs", jobs)):
        whole(name, value)
    if type(seed) is not int or not 0 <= seed < 2**31:
        raise ParameterError(f"search_seed={seed!r}: a whole number from 0 to 2^31 - 1 is needed")
    folder = Path(out).expanduser()
    given, split, input_bound = simulation(settings, scale=scale, validation=validation, seed=seed)
    search = given.as_dict() | {"space": {name: asdict(dimension) for name, dimension in space.items()}}
    with _alone(folder):
        _start(folder, search)
        study = _Study(folder, space, trials=trials, seed=seed, jobs=jobs)
        with workers(given, split, input_bound, jobs=jobs) as start:
            waiting: dict[Future[dict[str, Any]], tuple[int, dict[str, Scalar]]] = {}
            while True:
                while len(waiting) < jobs and (trial := study.next()) is not None:
                    waiting[start(trial[1])] = trial
                if not waiting:
                    break
                ended = next(iter(wait(waiting, return_when=FIRST_COMPLETED).done))
                number, drawn = waiting.pop(ended)
                found = outcome(ended, drawn)
                write_json(folder / "trials" / f"{number:04d}.json", {"number": number, **found})
                study.end(number, found["value"])
                if progress is not None:
                    progress(number, found, Found(given, _records(folder, study)))
        result = Found(given, _records(folder, study))
        write_json(folder / "result.json", result.as_dict(out=str(folder / "full")))
    return result


class _Study:
    """An Optuna study in SQLite: what to run next, and what came out. A run is not asked for again once it ended."""

    def __init__(self, folder: Path, space: Mapping[str, Dimension], *, trials: int, seed: int, jobs: int) -> None:
        optuna = _optuna()
        self._states = optuna.trial.TrialState
        self._sampler = lambda number: optuna.samplers.TPESampler(seed=seed + number, constant_liar=jobs > 1)
        self._space = {name: _distribution(optuna, dimension) for name, dimension in space.items()}
        self.running = set[int]()
        self._study = optuna.create_study(
            storage=f"sqlite:///{folder.resolve() / 'study.db'}",
            study_name=STUDY,
            direction="maximize",
            load_if_exists=True,
        )
        self._study.set_user_attr("label", LABEL)
        self._study.set_user_attr("private", False)
        grid = _grid(space, trials)
        for drawn in grid:
            self._study.enqueue_trial(drawn, skip_if_exists=True)
        self._wanted = len(grid) or trials
        self._interrupted = [t.number for t in self._trials(self._states.RUNNING)]

    def ended(self) -> list[int]:
        """Numbers of the runs that are over."""
        return [trial.number for trial in self._trials(self._states.COMPLETE, self._states.PRUNED)]

    def next(self) -> tuple[int, dict[str, Scalar]] | None:
        """The next run, first of all one that a killed search had begun; None where there are enough."""
        if len(self.ended()) + len(self.running) >= self._wanted:
            return None
        while self._interrupted:
            number = self._interrupted.pop(0)
            drawn = self._study.get_trials(deepcopy=False)[number].params
            if set(drawn) == set(self._space):
                self.running.add(number)
                return number, _rounded(drawn)
            self._study.tell(number, state=self._states.FAIL)  # killed while it was drawn
        self._study.sampler = self._sampler(len(self.ended()) + len(self.running))
        trial = self._study.ask(self._space)
        trial.set_user_attr("label", LABEL)
        self.running.add(trial.number)
        return trial.number, _rounded(trial.params)

    def end(self, number: int, value: float | None) -> None:
        """Enter what came out; a diverged run is worse than any other."""
        self.running.remove(number)
        if value is None or not math.isfinite(value):
            self._study.tell(number, state=self._states.PRUNED)
        else:
            self._study.tell(number, value)

    def _trials(self, *states: Any) -> list[Any]:
        return list(self._study.get_trials(deepcopy=False, states=states))


def confirm(found: Found, run: str | os.PathLike[str]) -> dict[str, Any]:
    """What the full private run in a folder made of the prediction: its own accuracy and ε, and the compute saved."""
    folder, best, metric = Path(run).expanduser(), found.best, found.simulation.metric
    config, privacy = read_json(folder / "config.json"), read_json(folder / "privacy.json")
    last = _last_metrics(folder)
    if last.get("step") != privacy.get("planned_steps"):
        raise CheckpointError(
            f"the run in {folder} has taken {last.get('step')} steps: go on with --resume {folder} first"
        )
    different = _different(found.simulation, best["drawn"], config)
    if different:
        raise ParameterError(
            f"{folder} is another run than the search's best: {different}; {found.simulation.command(best['drawn'])}"
        )
    achieved = last[f"test_{metric}_ema"]
    if achieved is None:
        raise ParameterError(
            f"{folder} has no {metric} of its test part (null in metrics.jsonl): there is nothing to compare"
        )
    return {
        "run": str(folder),
        f"predicted_{metric}": best["value"],
        f"achieved_{metric}": achieved,
        "difference": achieved - best["value"],
        "epsilon": privacy["epsilon"],
        "delta": privacy["delta"],
        "seconds_of_the_full_run": last["seconds"],
        "seconds_searched": sum(record["seconds"] for record in found.trials.values()),
        "samples_saved": found.simulation.plan.samples * len(found.trials) - found.samples,
        "not_covered": "the choice of the settings, made by looking at simulated runs on the private records",
    }


def _different(given: Simulation, drawn: Mapping[str, Scalar], config: Mapping[str, Any]) -> str:
    wanted = configure(**given.full_settings(drawn)).as_dict()
    ignored = RUNTIME | {"delta"} | ({"bounding", "bounding_options"} if wanted["bounding"] is None else set())
    return "; ".join(
        f"{name} is {config.get(name)!r}, should be {value!r}"
        for name, value in wanted.items()
        if name not in ignored and config.get(name) != value and not (name == "loss" and value is None)
    )


def _last_metrics(folder: Path) -> dict[str, Any]:
    try:
        last: dict[str, Any] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"{folder} holds no metrics ({error}): is it the folder of a finished run?") from error
    return last


def _grid(space: Mapping[str, Dimension], trials: int) -> list[dict[str, Scalar]]:
    """All there is, where there are choices alone and enough trials."""
    choices = {name: dimension.values for name, dimension in space.items() if isinstance(dimension, Choice)}
    if len(choices) < len(space) or math.prod(map(len, choices.values())) > trials:
        return []
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def _rounded(drawn: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Four digits of a number are enough, and fit in a command."""
    return {n: float(f"{value:.4g}") if isinstance(value, float) else value for n, value in drawn.items()}


def _distribution(optuna: Any, dimension: Dimension) -> Any:
    if isinstance(dimension, Choice):
        return optuna.distributions.CategoricalDistribution(dimension.values)
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _records(folder: Path, study: _Study) -> dict[int, dict[str, Any]]:
    return {number: read_json(folder / "trials" / f"{number:04d}.json") for number in study.ended()}


def _start(folder: Path, search: dict[str, Any]) -> None:
    """Write `simulation.json`, or refuse a folder with another one."""
    path, plain = folder / "simulation.json", json.loads(json.dumps(search))
    if not path.exists():
        write_json(path, plain)
        return
    before, now = _flat(read_json(path)), _flat(plain)
    changed = [name for name in sorted({*now, *before}) if now.get(name) != before.get(name)]
    if changed:
        listed = "; ".join(f"{n} was {json.dumps(before.get(n))}, is now {json.dumps(now.get(n))}" for n in changed)
        raise ResumeError(f"{folder} holds another search ({listed}): give the same settings, or another --out")


def _flat(search: Mapping[str, Any]) -> dict[str, Any]:
    """What two searches must have in common, without what may change at a resume."""
    settings = {name: value for name, value in search.get("settings", {}).items() if name not in RUNTIME}
    return {**{name: search.get(name) for name in ("scale", "validation", "seed", "space", "full")}, **settings}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one search at a time in a folder; the lock goes with the process."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds figures of private records
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error.strerror or error}): give another --out") from error
    with lock:
        with suppress(ImportError):  # Windows: two searches in one folder are then not noticed
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResumeError(f"a search is going on in {folder}: wait for it, or give another --out") from None
        yield


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ParameterError(f'the search needs Optuna ({error}): pip install "lipdp[planning]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
