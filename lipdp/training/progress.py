"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lipdp.privacy.engine import PrivacyEngine


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        loss: () float64, the sum since the last record; not private.
        step: noisy steps taken.
        seconds: spent on them.
        samples: rows since the last record.
        records: the lines of metrics.
        stds: of the noise of the last step, by parameter; None: the engine has them.
    """

    loss: Tensor
    step: int = 0
    seconds: float = 0.0
    samples: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    stds: dict[str, float] | None = field(default_factory=dict)

    def noise_stds(self, engine: PrivacyEngine) -> dict[str, float]:
        """Parameter → the standard deviation of its noise in the last step; none before the first."""
        if self.stds is None:
            self.stds = engine.noise_stds()
        return self.stds

    def since_record(self) -> None:
        """Begin anew with loss and samples."""
        self.loss.zero_()
        self.samples = 0
