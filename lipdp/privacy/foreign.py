"""Arguments of Opacus, answered with what stands for them here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lipdp.errors import ParameterError

_ANSWERS = {
    "alphas": "leave it out: PrivacyEngine(accountant='rdp') has orders of its own",
    "batch_first": "leave it out: the first axis is the batch",
    "batch_size": "it is expected_batch_size here, since batches are drawn at random",
    "clipping": "leave it out: nothing is clipped; bounds come from the model",
    "data_loader": "give dataset=loader.dataset: batches are drawn afresh, and a loader is returned",
    "grad_sample_mode": "leave it out: there are no per-sample gradients",
    "loss_reduction": "leave it out: the criterion that is returned reads as a mean, and gradients are summed",
    "max_grad_norm": "leave it out: gradients are bounded by the model; gate= bounds the cotangent at the logits",
    "noise_generator": "give PrivacyEngine(seed=...), for tests",
    "poisson_sampling": "it is sampling='poisson' (default) or 'fixed_size'",
    "sample_rate": "it follows from expected_batch_size and the dataset's length",
    "secure_mode": "give PrivacyEngine(secure=True)",
}


def refuse_unknown(function: str, given: Mapping[str, Any]) -> None:
    """Refuse arguments that the function lacks, and say what stands for those of Opacus.

    Raises:
        ParameterError: there is one.

    >>> refuse_unknown("make_private", {"max_grad_norm": 1.0})
    Traceback (most recent call last):
    lipdp.errors.ParameterError: make_private has no max_grad_norm: leave it out: gradients are bounded by the model;...
    """
    if given:
        raise ParameterError(
            "; ".join(f"{function} has no {n}: {_ANSWERS.get(n, 'see its documentation')}" for n in given)
        )
