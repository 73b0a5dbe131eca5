"""Calibration of a run's model on its test records, where they can be read."""

from __future__ import annotations

import os

import torch

from lipdp.certify.inputs import apply_maps
from lipdp.certify.run import load_run
from lipdp.comparison.calibration import Calibration, calibration
from lipdp.errors import LipdpError, ParameterError
from lipdp.report.reading import RecordedRun
from lipdp.training.choices import make_loss

_BROKEN = (ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What a damaged or foreign configuration can make the data, the model or its weights raise."""


def run_calibration(
    run: RecordedRun, *, data_dir: str | os.PathLike[str] | None = None, run_code: bool = False
) -> tuple[Calibration | None, str]:
    """The calibration of the run's model, or None and why there is none; arguments as of `gather`."""
    model = str(run.config.get("model"))
    if ":" in model and not run_code:
        return None, (
            f"The model is built by code of its own ({model}). If you trust it, add --run-code to have it built and"
            " evaluated."
        )
    try:
        return _calibration(run, data_dir), ""
    except (LipdpError, *_BROKEN) as error:
        return None, f"Not computed: {str(error) or type(error).__name__}"


def _calibration(run: RecordedRun, data_dir: str | os.PathLike[str] | None) -> Calibration:
    loaded = load_run(run.folder, data_dir=data_dir)
    loss, _ = make_loss(str(loaded.config.loss), int(loaded.y.max()) + 1, loaded.config.loss_options)
    tau = getattr(loss, "tau", None)
    if tau is None:
        raise ParameterError(f"the loss {loaded.config.loss} gives no probabilities, so there is nothing to calibrate")
    inputs = apply_maps(loaded.maps, loaded.x, torch.float32)
    return calibration(loaded.model, inputs, loaded.y, temperature=float(tau))
