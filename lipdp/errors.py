"""Every exception lipdp raises on purpose. Each message says what was given and what would be right."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable


def outside() -> int:
    """The `stacklevel` with which `warnings.warn` names the line that called into lipdp."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "lipdp":
        frame, level = frame.f_back, level + 1
    return level


class LipdpError(Exception):
    """Base of all lipdp errors; the command prints its message and ends with exit code 2."""


class ParameterError(LipdpError, ValueError):
    """An argument is outside its range: q outside (0, 1], σ ≤ 0, δ not in (0, 1), a negative size, …"""


class UnknownNameError(LipdpError, KeyError):
    """A name that does not exist. The message lists the valid names.

    >>> str(UnknownNameError("model", "cnnn", ["cnn", "mlp"]))
    "unknown model 'cnnn'; did you mean 'cnn'? Known: cnn, mlp"
    """

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        from difflib import get_close_matches

        names = sorted(known)
        close = get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ";"
        self.message = f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}"
        super().__init__(kind, name, names)  # what a process needs to hand it to another

    def __str__(self) -> str:
        return self.message


def check_known(what: str, given: Iterable[str], known: Collection[str]) -> None:
    """Refuse options there are not: ParameterError, which lists those there are.

    >>> check_known("mlp", ["width"], ["width", "depth"])
    """
    if unknown := sorted(set(given) - set(known)):
        raise ParameterError(
            f"{what} has no option {', '.join(map(repr, unknown))}; its own options are: {', '.join(known) or 'none'}"
        )


class UnsupportedLayerError(LipdpError, ValueError):
    """A layer whose settings have no sound bound (dilation, reflect padding, …)."""


class UnsupportedOperationError(LipdpError):
    """A node of the traced model without a rule; the message names it and how to register one."""


class MixesSamplesError(LipdpError):
    """The model lets one sample influence another's output, so no per-sample bound exists."""


class UnboundedError(LipdpError):
    """A parameter without a finite sensitivity, or a network without a finite Lipschitz constant."""


class LossError(LipdpError):
    """A loss without a constant in the logits, or one that couples the samples of a batch."""


class ConstraintError(LipdpError):
    """A weight that a constraint cannot hold (wrong shape, not finite)."""


class NonFiniteError(LipdpError):
    """NaN or infinity in an input, a weight or a gradient; the message names the step and the parameter."""


class OptimizerError(LipdpError):
    """The optimiser holds other parameters than the model, evaluates its closure twice, or is already private."""


class EngineError(LipdpError):
    """The engine was used in an order, or with a batch, that would break the guarantee."""


class PeerError(EngineError):
    """Another process refused the step. It raises the error; this one repeats the message."""


class CalibrationError(LipdpError):
    """No noise multiplier reaches the target ε; the message says why."""


class AccountingError(LipdpError):
    """An accountant failed numerically or does not cover the event."""


class DataError(LipdpError):
    """A data file is missing, truncated or corrupt; the message names the file and what to do."""


class RecordError(DataError):
    """One record cannot be read. A run uses a record of zeros: to stop would tell that the record is there."""


class RefusedMethodError(LipdpError, AttributeError):
    """A method that an interface expects and that would break the guarantee; the message says why."""


class PrivacyLeakWarning(UserWarning):
    """No ε that is told covers this: it was read off the data, its noise has a seed, or it has two accounts."""


class BudgetSpentWarning(UserWarning):
    """A loader is iterated after its last batch. It yields nothing."""


class CannotLearnWarning(UserWarning):
    """The noise of a run drowns anything that its gradients can add up to, or Δ has grown far beyond the first."""


class CheckpointError(LipdpError):
    """A checkpoint cannot be read or written."""


class ResumeError(LipdpError):
    """A resumed run would change something that ε depends on."""


class FinishedError(ResumeError):
    """The run that was to go on has taken all its steps."""


class ChangedError(EngineError):
    """The model or the loss is not what the bounds were derived for; `difference` says what is another."""

    def __init__(self, message: str, difference: str = "") -> None:  # a process unpickles by the message alone
        super().__init__(message)
        self.difference = difference


class BoundViolation(LipdpError, AssertionError):
    """A gradient larger than the declared bound, found by `lipdp.testing` or by a run's own check of its records."""
