"""How a run puts its batches through the model: precision, memory format, compiled or not."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lipdp.errors import ParameterError, UnknownNameError

PRECISIONS = {"bf16": torch.bfloat16}
OFF = "off"


def precision(name: str | None) -> torch.dtype | None:
    """The dtype of the forward pass under autocast, by name; None without.

    >>> precision("bf16"), precision("off")
    (torch.bfloat16, None)
    """
    if name is None or name == OFF:
        return None
    if name not in PRECISIONS:
        raise UnknownNameError("precision of autocast", name, [*PRECISIONS, OFF])
    return PRECISIONS[name]


class Forward:
    """The forward pass of training; ε depends on none of it, for Δ is computed for `autocast` at every step.

    Compiled, the size of a batch stays a variable of the code, so that Poisson batches, which all differ, do not
    compile anew. A batch of one, which would get code of its own, is run as written, and so is all but training.

    Args:
        model: the run's.
        autocast: dtype of products, or None.
        channels_last: images with the channels side by side in memory. The same values.
        compiled: whether `torch.compile` has its hand in it.
        backend: of torch.compile.

    Attributes:
        module: the model, or what `torch.compile` made of it; the parameters are the same.

    >>> Forward(torch.nn.Flatten())(torch.zeros(2, 1, 3, dtype=torch.float64)).dtype
    torch.float32
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        compiled: bool = False,
        backend: str = "inductor",
    ) -> None:
        self.model, self.autocast, self.channels_last = model, autocast, channels_last
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        made: Any = torch.compile(model, backend=backend) if compiled else model
        self.module: nn.Module = made

    def __call__(self, x: Tensor) -> Tensor:
        """Logits, in float32. `x`: (n, *input_shape), n ≥ 1, of any float dtype."""
        x = x.float()
        if self.channels_last and x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        with nullcontext() if self.autocast is None else torch.autocast(x.device.type, dtype=self.autocast):
            compiled = self.module is not self.model and len(x) > 1
            return (self._compiled(x) if compiled else self.model(x)).float()

    def _compiled(self, x: Tensor) -> Tensor:
        from torch import _dynamo  # heavy

        _dynamo.maybe_mark_dynamic(x, 0)
        try:
            return self.module(x)
        except _dynamo.exc.TorchDynamoException as error:
            reason = f"{' '.join(str(error).split()):.200}".partition(" Set TORCH")[0]
            raise ParameterError(
                f"torch.compile cannot compile this model here ({reason}); leave --compile out, or go on"
                " with --no-compile"
            ) from error
