"""The privacy statement in words, and what must be said loudly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lipdp.accounting.accountants import get_accountant
from lipdp.accounting.events import Event
from lipdp.accounting.plan import in_bands, truncation
from lipdp.accounting.relation import Relation
from lipdp.accounting.tradeoff import trade_off
from lipdp.errors import LipdpError
from lipdp.report.reading import Account, RecordedRun

PUBLIC = (
    "the number of training records N, the batch size B and with them the sampling rate q = B/N",
    "the number of steps, δ, and every other setting of the run",
    "the architecture, the bound on the inputs and the constants they are normalised with",
    "the trained weights, after every step, and everything computed from them",
)
"""What the guarantee allows anybody to know."""

NOT_COVERED = (
    "the training loss and accuracy: exact figures of the training records",
    "figures on the test records, if those are private too",
    "constants computed from the private data and passed off as public",
    "settings that were chosen by looking at private data, e.g. by comparing several runs",
    "other models or statistics made from the same records: their ε add up",
    "facts about a whole group, which are learned whether or not a given member took part",
)
"""What ε says nothing about."""

_MOST = 700.0  # e^709 is the largest float


@dataclass(frozen=True)
class Notice:
    """Something that a reader must not miss. `alarm`: the guarantee does not hold, or cannot be relied on."""

    title: str
    text: str
    alarm: bool = False


def best_guess(epsilon: float, delta: float) -> float:
    r"""The most a membership test at even odds can be right, (e^ε + δ) / (1 + e^ε).

    An (ε, δ)-DP mechanism makes the two errors of every test obey α + e^ε β ≥ 1 − δ and e^ε α + β ≥ 1 − δ, so
    α + β ≥ 2 (1 − δ)/(1 + e^ε), and the test is right with probability 1 − (α + β)/2.

    Source: Kairouz, Oh & Viswanath (2015), theorem 2.1.
    """
    return 1.0 - (1.0 - delta) / (1.0 + math.exp(min(epsilon, _MOST)))


def strength(epsilon: float) -> str:
    """How such an ε is usually judged.

    >>> strength(0.5), strength(3.0), strength(11.0)
    ('strong', 'reasonable', 'weak')

    Source: Ponomareva et al. (2023), "How to DP-fy ML", section 5.2: tiers at ε = 1 and 10.
    """
    return "strong" if epsilon <= 1 else "reasonable" if epsilon <= 10 else "weak"


def one_in(delta: float) -> str:
    """A small probability as odds, in brackets.

    >>> one_in(1e-5), one_in(0.0)
    (' (1 in 100,000)', '')
    """
    return f" (1 in {round(1 / delta):,})" if 1e-18 < delta < 0.5 else ""


def paragraphs(account: Account) -> tuple[str, ...]:
    """What the guarantee says, for somebody who has never heard of it."""
    n, unit = f"the {account.dataset_size:,}", account.unit
    those, with_all = {
        "record": ("training records", ""),
        "owner": ("owners of training records", " (with all their records)"),
    }[unit]
    change, odds = {
        Relation.ADD_OR_REMOVE_ONE: (
            f"Add one {unit}{with_all} to {n} {those}, or take one away",
            f"whether one particular {unit} was among the training data",
        ),
        Relation.REPLACE_ONE: (
            f"Replace one of {n} {those}{with_all} by any other",
            f"which of two particular {unit}s was among the training data",
        ),
    }[account.relation]
    factor = math.exp(min(account.epsilon, _MOST))
    how = f"{factor:,.2f}" if factor < 1000 else f"{factor:.2g}"
    opening = (
        f"{change}: no outcome of the training becomes more than {how} times as likely (the factor is e to the power of"
        f" ε = {account.epsilon:.3g}), nor less likely by more than that factor, except with a probability of at most"
        f" δ = {account.delta:g}{one_in(account.delta)}. An outcome is everything that can be seen of the model: its"
        " weights after every step, its predictions, whatever is computed from them."
    )
    practice = (
        f"Put differently: somebody who knows all the other {unit}s and gives even odds to {odds} is right at most"
        f" {_guess(account)}\u00a0% of the time after studying the model, where a"
        f" coin is right 50\u00a0% of the time. This is a bound for the worst {unit} and the best attack, proved rather"
        " than measured."
    )
    judged = (
        f"By the usual reading ε = {account.epsilon:.3g} is a {strength(account.epsilon)} guarantee (up to 1 strong, up"
        " to 10 reasonable, above that weak: Ponomareva et al. 2023, How to DP-fy ML)."
    )
    return (opening, practice, judged)


@dataclass(frozen=True)
class Attack:
    """What any attack can reach, from the account of the whole run.

    Attributes:
        tpr: (false-positive rate, upper bound on the true-positive rate) pairs.
        mu, floor: the run is μ-GDP up to δ₀ = `floor`.
    """

    tpr: tuple[tuple[float, float], ...]
    mu: float
    floor: float


def attack(account: Account) -> Attack | None:
    """At false-positive rates of 1 % and 0.1 %; None where the account gives none."""
    try:
        curve = trade_off(_events(account))
    except LipdpError:
        return None
    return Attack(tuple((rate, curve.tpr(rate)) for rate in (0.01, 0.001)), curve.mu, curve.floor)


def _guess(account: Account) -> str:
    """How often the best attack is right at most, in percent, rounded up."""
    return f"{math.ceil(1000 * best_guess(account.epsilon, account.delta)) / 10:g}"


def lead(run: RecordedRun, *, holds: bool) -> tuple[str, str]:
    """What was protected and how strongly, and how good the model is: a sentence each, for anybody."""
    account = run.account
    if holds:
        whose = "whose records" if account.unit == "owner" else "that"
        protected = (
            f"Whoever studies this model and guesses whether a given {account.unit} was among the"
            f" {account.dataset_size:,} {whose} it was trained on is right at most {_guess(account)}\u00a0% of the"
            f" time, where a coin is right 50\u00a0% of the time (ε = {account.epsilon:.3g}, a"
            f" {strength(account.epsilon)} guarantee)."
        )
    else:
        protected = "The privacy of the training records is not assured: see the warning."
    score, metric = run.score(), run.metric
    if score is None:
        return protected, "How good the model is was not recorded."
    if metric == "auroc":
        return protected, (
            f"Given a test record of each class, the model ranks the two correctly {100 * score:.1f}\u00a0% of the time"
            " (AUROC)."
        )
    return protected, f"The model gives the right answer for {100 * score:.1f}\u00a0% of the test records."


def nist(account: Account) -> tuple[tuple[str, str], ...]:
    """The statement under the words of NIST SP 800-226, "Guidelines for Evaluating Differential Privacy Guarantees".

    Source: Near, Darais, Lefkovitz & Howarth (March 2025), doi:10.6028/NIST.SP.800-226.
    """
    unit, change = account.unit, account.relation.words
    correlated = f", correlated over {account.bands} steps," if account.bands > 1 else ""
    sampling = {"poisson": "Poisson subsampling", "fixed_size": "subsampling without replacement"}
    return (
        (
            "Unit of privacy",
            f"one {unit}"
            + (
                ", with all records of theirs" if unit == "owner" else "; for somebody with several records ε is larger"
            ),
        ),
        ("Neighbouring data sets", f"{change} {unit} ({'un' if change.startswith('add') else ''}bounded)"),
        (
            "Privacy parameters",
            f"ε = {account.epsilon:.4g} at δ = {account.delta:g}, for all {account.steps:,} steps together",
        ),
        (
            "Mechanism",
            f"Gaussian noise{correlated} on sums of gradients, {sampling.get(account.sampling, account.sampling)}"
            f"{in_bands(1, account.truncated_batch_size)}",
        ),
        (
            "Trust model",
            "central: whoever runs the training sees the records; everybody else sees at most all weights of all steps",
        ),
        (
            "Hazards to check",
            "bounds on inputs and labels must be public; settings chosen on the same records, other releases from them,"
            " records that depend on each other, and correlations within a group are outside the guarantee; an"
            " unfinished run holds its noise in the folder"
            + ("" if account.secure else "; the noise comes from a generator that is no cipher"),
        ),
    )


def recomputed_epsilon(account: Account) -> float | None:
    """ε from the measurements, σ, q, T and δ alone; None where they give none."""
    try:
        return get_accountant(account.accountant).epsilon(_events(account), account.delta).epsilon
    except LipdpError:
        return None


def _events(account: Account) -> list[Event]:
    """The measurements, and the steps."""
    once = [Event(m.noise_multiplier, 1.0, 1, account.relation) for m in account.measurements]
    rate = min(1.0, account.bands * account.sampling_rate)
    most = account.truncated_batch_size
    cut = 0.0 if most is None else truncation(account.dataset_size, account.sampling_rate, most)
    return [*once, Event(account.noise_multiplier, rate, account.steps, account.relation, account.bands, cut)]


_ALARMS: tuple[tuple[Callable[[RecordedRun], bool], str, str], ...] = (
    (
        lambda run: run.account.seeded,
        "This run is NOT private",
        "It was trained with a fixed seed, so anybody who knows the seed can repeat the noise and take it away. The"
        " figures below are those of the same run without a seed. Use it for tests only; train again without one to"
        " release a model.",
    ),
    (
        lambda run: run.account.intact is False,
        "privacy.json was changed after it was written",
        "Its digest does not agree with its contents, so no figure in it can be relied on.",
    ),
    (
        lambda run: run.audit is not None and run.audit.violated,
        "An audit refutes the claim",
        "The audit's lower bound on ε is above the ε claimed: the guarantee did not hold where it was tested.",
    ),
)


def notices(run: RecordedRun, recomputed: float | None) -> tuple[Notice, ...]:
    """What must not be missed, the alarms first."""
    account = run.account
    found = [Notice(title, text, alarm=True) for holds, title, text in _ALARMS if holds(run)]
    if recomputed is None:
        found.append(
            Notice("ε could not be checked", "No accountant gives an ε for the σ, q, T and δ of this run.", alarm=True)
        )
    elif account.epsilon < recomputed * (1 - 1e-3) - 1e-6:
        text = (
            f"From its own σ, q, T and δ this run spent ε = {recomputed:.4g}, and privacy.json claims"
            f" {account.epsilon:.4g}."
        )
        found.append(Notice("ε is larger than claimed", text, alarm=True))
    if account.dataset_size and account.delta >= 1 / account.dataset_size:
        text = (
            f"δ = {account.delta:g} is not below 1/N: a guarantee with such a δ may still publish a whole"
            f" {account.unit}."
        )
        found.append(Notice("δ is too large", text, alarm=True))
    if not account.finished:
        text = (
            f"{account.steps} of {account.planned_steps} steps are taken. While a run can be resumed its checkpoint"
            " holds the noise to come: keep the folder as secret as the data."
        )
        found.append(Notice("The run is not finished", text))
    if account.steps_counted_again:
        text = f"{account.steps_counted_again} steps were lost with a checkpoint and taken again; ε counts them twice."
        found.append(Notice("Some steps are counted twice", text))
    if account.accountant_note:
        found.append(Notice("Another accountant answered", account.accountant_note))
    if run.robustness and run.robustness.step not in (account.steps, account.steps - account.steps_counted_again):
        text = f"They were computed after step {run.robustness.step}. Run lipdp certify again."
        found.append(Notice("The certified radii are of other weights", text))
    return tuple(found)
