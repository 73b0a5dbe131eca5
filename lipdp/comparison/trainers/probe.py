"""Whether Opacus finds each record's own gradient."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from opacus.validators import ModuleValidator
from torch import Tensor

from lipdp.errors import LipdpError, UnsupportedLayerError
from lipdp.processes import is_out_of_memory

if TYPE_CHECKING:
    from lipdp.comparison.trainers.opacus import OpacusSession

_RECORDS = 4  # of two, batch normalisation makes ±1 whatever they are
_TOLERANCE = 0.01  # of a norm: float32, or TF32 on a GPU


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """The first layer's input needs no gradient, and its hook says so every time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        yield


def probe(session: OpacusSession) -> None:
    """Refuse a model for which Opacus' gradient of a record differs from autograd's, by their norms on four records.

    Opacus goes by what enters and leaves each layer, and takes rows for records. Where records mix, or one is several
    rows, clipping bounds no record's part in the sum; nor does ghost clipping where a norm comes out too small. It is
    a check at the start, on weights as they are then: layers whose gradients are 0 there are not seen. The model stays
    as it was; no random number is used up.

    Raises:
        UnsupportedLayerError: that, or what the model or Opacus raise, unless memory ran out.
    """
    model, device = session.model, session.parameters[0].device
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), quiet_hooks():
            _compare(session)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, LipdpError):
            raise
        reason = str(error) or type(error).__name__
        raise UnsupportedLayerError(f"{session.trainer.name} cannot train this model: {reason}") from error
    finally:
        session.private.zero_grad(set_to_none=True)
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)


def _compare(session: OpacusSession) -> None:
    task = session.task
    x, y = (t[:_RECORDS] for t in task.dataset.tensors)
    if task.views > 1:
        x, y = x.flatten(0, 1), y.repeat_interleave(task.views, 0)
    errors = ModuleValidator.validate(session.model.train())
    if errors:
        raise errors[0]
    losses = task.loss(session.model(x), y)
    session.hooks.disable_hooks()
    true = torch.stack([_norms(session, mean) for mean in losses.unflatten(0, (-1, task.views)).mean(1)], dim=1)
    session.hooks.enable_hooks()
    session.backward(losses)
    slack = _TOLERANCE * (true + 0.01 * true.norm(dim=0))
    pairs = zip(session.norms(), true, slack, strict=True)
    if not all(found.shape == own.shape and bool(((found - own).abs() <= room).all()) for found, own, room in pairs):
        raise UnsupportedLayerError(
            f"{session.trainer.name} cannot train this model: what Opacus takes for the gradient of a record is not its"
            " gradient, or is not finite. Rows must be records, which do not mix (no batch normalisation), and weights"
            " be used by their own layers alone; opacus_functorch alone knows padding other than zeros, and images that"
            " were permuted"
        )


def _norms(session: OpacusSession, loss: Tensor) -> Tensor:
    """(parameters,) of the gradients of one record's loss, by autograd."""
    found = torch.autograd.grad(loss, session.parameters, retain_graph=True, allow_unused=True)
    without = {id(p) for p, g in zip(session.parameters, found, strict=True) if g is None}
    if without:
        names = [name for name, p in session.model.named_parameters() if id(p) in without]
        raise UnsupportedLayerError(
            f"{session.trainer.name} cannot train this model: the loss does not depend on {', '.join(names)};"
            " freeze what is not used"
        )
    return torch.stack([torch.linalg.vector_norm(g) for g in found if g is not None])
