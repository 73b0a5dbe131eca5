"""Noise with bands in a run: what is refused beside it, and what must stay as it was at the first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lipdp.accounting.plan import PrivacyPlan
from lipdp.batches.owners import Owners
from lipdp.batches.population import glance
from lipdp.errors import CheckpointError, EngineError, ParameterError, ResumeError
from lipdp.noise.banded import BandedNoise
from lipdp.noise.gaussian import GaussianNoise
from lipdp.privacy.options import Request


class Correlated:
    """Keeps the rows of `BandedNoise`, the batches and the account in step; its docstring says why."""

    def __init__(self, noise: GaussianNoise, bands: int, names: Sequence[str], records: str) -> None:
        self._noise, self._names, self._records = BandedNoise(noise, bands), list(names), records

    @classmethod
    def of(
        cls, plan: PrivacyPlan, request: Request, noise: GaussianNoise, names: Sequence[str], *, owners: Owners | None,
        steps: int, beside: Sequence[str],
    ) -> Correlated | None:  # fmt: skip
        """The noise of a plan with bands."""
        if plan.bands == 1:
            return None
        if steps:
            raise EngineError(f"bands={plan.bands}: this engine has taken steps already; use an engine of its own")
        if beside:
            raise ParameterError(f"bands={plan.bands} beside {beside[0]} is not proven: take bands=1, or leave it out")
        return cls(
            noise, plan.bands, names, glance(request.dataset, inputs=True) + ("" if owners is None else owners.digest)
        )

    def check(self, names: Sequence[str]) -> None:
        """Refuse a step that trains other parameters than the first: EngineError."""
        if list(names) != self._names:
            raise EngineError(
                "this step trains other parameters than the first step did. With bands, noise is carried from step to"
                " step. Freeze before make_private, or take bands=1"
            )

    def add_(self, gradients: Sequence[Tensor], stds: Tensor, *, batch: int) -> None:
        """The noise of the step of this batch; see `BandedNoise.add_`."""
        self._noise.add_(gradients, stds, row=batch)

    def skip_(self, batch: int) -> None:
        """The batches up to this one are given up."""
        self._noise.skip_(batch)

    @property
    def mark(self) -> list[Any]:
        """What all processes must agree on."""
        return self._noise.mark

    def state_dict(self, *, over: bool) -> dict[str, Any]:
        """See `BandedNoise.state_dict`."""
        return {**self._noise.state_dict(over=over), "records": self._records}

    def load_state_dict(self, state: Any) -> None:
        """Continue bit for bit; refuse other records, or another order of them."""
        if not isinstance(state, dict):
            raise CheckpointError("the state of the engine lacks its past noise, which later steps need with bands")
        if state.get("records") != self._records:
            raise ResumeError(
                "since the run began, the records or their order changed: with bands, a record would be in two groups."
                " Give the same data in the same order, or start a new run"
            )
        self._noise.load_state_dict(state)
