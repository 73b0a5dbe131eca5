"""`lipdp epsilon` and `lipdp calibrate`: (q, σ, T, δ) to ε and back, every accountant side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lipdp.commands.options import with_config
from lipdp.errors import CalibrationError, ParameterError

if TYPE_CHECKING:
    from lipdp.accounting.accountants import Spent
    from lipdp.accounting.plan import Subsampling

_ACCOUNTANTS = ("prv", "pld", "rdp")

EPSILON_EPILOG = """[bold]Examples[/bold]

[green]lipdp epsilon --noise-multiplier 1.1 --sampling-rate 0.01 --steps 1000[/green]

[green]lipdp epsilon --noise-multiplier 1.1 --sampling-rate 0.01 --steps 1000 --tpr 0.01 0.001[/green]  (attacks)

[green]lipdp epsilon --noise-multiplier 4.5 --batch-size 4096 --dataset-size 60000 --epochs 20 --json[/green]"""

CALIBRATE_EPILOG = """[bold]Examples[/bold]

[green]lipdp calibrate --epsilon 1 --batch-size 4096 --dataset-size 60000 --epochs 20[/green]

[green]lipdp calibrate --epsilon 3 --delta 1e-6 --sampling-rate 0.02 --steps 500 --sampling fixed_size[/green]"""

Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table")]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How batches are drawn, as both commands take it, and δ."""

    sampling_rate: Annotated[float | None, "q, in (0, 1]"] = None
    batch_size: Annotated[int | None, "B, with --dataset-size instead of q"] = None
    dataset_size: Annotated[int | None, "N, with --batch-size"] = None
    steps: Annotated[int | None, "T"] = None
    epochs: Annotated[float | None, "instead of T: T = epochs / q"] = None
    delta: Annotated[float, "δ, in (0, 1)"] = 1e-5
    sampling: Annotated[str, "poisson (add or remove one), or fixed_size (replace one)"] = "poisson"
    bands: Annotated[int, "b of a run with --bands: batches of b groups in turn, correlated noise"] = 1
    truncated_batch_size: Annotated[int | None, "most records of a batch"] = None

    @property
    def subsampling(self) -> Subsampling:
        """Of q, or of B and N."""
        from lipdp.accounting.plan import Subsampling

        drawn: dict[str, Any] = {name: getattr(self, name) for name in ("steps", "epochs", "sampling", "bands")}
        most = self.truncated_batch_size
        if self.sampling_rate is None:
            if self.batch_size is None or self.dataset_size is None:
                raise ParameterError("give --sampling-rate, or --batch-size and --dataset-size")
            return Subsampling.of(self.dataset_size, self.batch_size, truncated_batch_size=most, **drawn)
        if most is not None:
            raise ParameterError(
                "--truncated-batch-size needs --batch-size and --dataset-size instead of --sampling-rate"
            )
        if self.batch_size is not None or self.dataset_size is not None:
            raise ParameterError("--sampling-rate follows from --batch-size and --dataset-size; give one or the other")
        return Subsampling.at(self.sampling_rate, **drawn)


@with_config(Draws)
def epsilon(
    draws: Draws,
    noise_multiplier: Annotated[float, typer.Option(help="σ > 0")],
    tpr: Annotated[
        list[float] | None,
        typer.Option(help="false-positive rates at which to bound an attacker's true-positive rate, e.g. 0.01 0.001"),
    ] = None,
    as_json: Json = False,
) -> None:
    """ε of a run, from its noise, by every accountant.

    Each is an upper bound. With --tpr also, from the privacy loss distribution: how often an attacker who may raise
    that share of false alarms finds out who took part, and the μ of the best Gaussian-DP statement.
    """
    from lipdp.accounting.accountants import get_accountant

    drawn, delta = draws.subsampling, draws.delta
    event = drawn.event(noise_multiplier)
    spent = {name: get_accountant(name).epsilon([event], delta) for name in _ACCOUNTANTS}
    account = _account(drawn, delta)
    account |= {"noise_multiplier": noise_multiplier, "epsilon": {name: s.epsilon for name, s in spent.items()}}
    notes = _notes(spent)
    if tpr:
        from lipdp.accounting.tradeoff import trade_off

        curve = trade_off([event])
        account |= {"tpr": {f"{rate:g}": curve.tpr(rate) for rate in tpr}, "mu": curve.mu, "mu_floor": curve.floor}
    _show(account, notes, as_json, f"σ = {noise_multiplier:g}", "ε", account["epsilon"])


@with_config(Draws)
def calibrate(
    draws: Draws,
    epsilon: Annotated[float, typer.Option(help="the target ε")],
    as_json: Json = False,
) -> None:
    """The least noise for a target ε, by every accountant.

    ε of the σ found is at most the target and at least 0.995 of it.
    """
    drawn, delta = draws.subsampling, draws.delta
    from lipdp.accounting.accountants import get_accountant

    found: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name in _ACCOUNTANTS:
        try:
            found[name] = drawn.noise_multiplier(epsilon=epsilon, delta=delta, accountant=name)
            notes |= _notes({name: get_accountant(name).epsilon([drawn.event(found[name])], delta)})
        except CalibrationError as error:
            notes[name] = str(error)
    if not found:
        raise CalibrationError(notes[_ACCOUNTANTS[0]])
    account = _account(drawn, delta) | {"target_epsilon": epsilon, "noise_multiplier": found}
    _show(account, notes, as_json, f"target ε = {epsilon:g}", "σ", found)


def _notes(spent: Mapping[str, Spent]) -> dict[str, str]:
    """Whose bound it is, where not of the accountant that was asked."""
    return {name: f"computed by {s.accountant}: {s.note}" for name, s in spent.items() if s.accountant != name}


def _account(drawn: Subsampling, delta: float) -> dict[str, Any]:
    stated: dict[str, Any] = {
        "sampling_rate": drawn.sampling_rate,
        "steps": drawn.steps,
        "bands": drawn.bands,
        "delta": delta,
    }
    if drawn.truncation:
        stated["truncation"] = drawn.truncation
    return {**stated, "relation": drawn.relation.value}


def _show(
    account: dict[str, Any], notes: dict[str, str], as_json: bool, given: str, symbol: str, values: dict[str, float]
) -> None:
    if as_json:
        typer.echo(json.dumps({**account, "notes": notes}, indent=2))
        return
    from lipdp.accounting.plan import in_bands
    from lipdp.commands.console import plain_console, plain_table

    console = plain_console()
    cut = f", a batch is full or cut with probability {account['truncation']:.3g}" if "truncation" in account else ""
    console.print(
        f"{given}, q = {account['sampling_rate']:.6g}, T = {account['steps']}"
        f"{in_bands(account['bands'])}, δ = {account['delta']:g},"
        f" {account['relation'].replace('_', ' ')}{cut}"
    )
    table = plain_table("accountant", symbol, "")
    for name in _ACCOUNTANTS:
        table.add_row(name, f"{values[name]:.5g}" if name in values else "-", notes.get(name, ""))
    console.print(table)
    if "mu" in account:
        for rate, bound in account["tpr"].items():
            console.print(f"with {float(rate):.3g} false alarms, an attack finds at most {bound:.3g} of who took part")
        console.print(f"μ = {account['mu']:.4g} (Gaussian DP, up to a δ of {account['mu_floor']:g})")
