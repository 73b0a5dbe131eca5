"""A frozen torch module as a feature map: any encoder, run once, each record by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lipdp.errors import MixesSamplesError, ParameterError, UnboundedError
from lipdp.models import own


@dataclass(frozen=True)
class Frozen:
    """What `module:function` returns, in evaluation mode, without gradients: (N, *shape) to (N, d) or (N, C, H, W).

    The function takes no argument and returns a `torch.nn.Module`, trained on public data or not at all: an encoder
    that saw the private records is not covered by ε. Nothing is known of its Lipschitz constant, so there is no
    certified radius behind it. The bound of its outputs is that of `FeatureSpec`, which brings each to norm 1.

    Guarantee: replacing a record changes its own features and no other's, for a module that treats records one by one
    in evaluation mode. One that does not is refused where a probe shows it (`MixesSamplesError`); a probe proves
    nothing, so the module's code is trusted here.

    Args:
        source: `package.module:function`.
    """

    source: str

    name: ClassVar[str] = "frozen"

    @property
    def module(self) -> nn.Module:
        """What the function returned, once in a process."""
        return _module(self.source)

    def version(self) -> str:
        """A digest of the weights and of the module's own text: other weights are another map."""
        digest = hashlib.sha256(repr(self.module).encode())
        for key, value in self.module.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return f"torch {torch.__version__}, {self.source}, {digest.hexdigest()}"

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, int, int]:
        """(d, 1, 1), or (C, H, W), found by a probe; the probe also looks whether records are mixed."""
        x = torch.rand(3, *input_shape, generator=torch.Generator().manual_seed(0))
        z, alone = self(x), self(x[:1])
        if not torch.allclose(z[:1], alone, rtol=1e-3, atol=1e-4):
            raise MixesSamplesError(
                f"{self.source}: the features of a record depend on the others in its batch. Use an encoder without"
                " batch statistics, or in evaluation mode"
            )
        channels, height, width = z.shape[1:]
        return channels, height, width

    def lipschitz(self, input_shape: Sequence[int]) -> float:
        """Refused: nothing is known of it."""
        raise UnboundedError(
            f"nothing is known of the Lipschitz constant of {self.source}, so no radius can be certified behind it:"
            " certify a run on raw inputs, or one that was trained with --certified"
        )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """(N, d, 1, 1), or (N, C, H, W)."""
        made: Any = self.module(x.float())
        z = next((made[key] for key in ("pooler_output", "last_hidden_state") if _has(made, key)), made)
        if not isinstance(z, Tensor) or z.dim() not in (2, 3, 4) or len(z) != len(x):
            raise ParameterError(
                f"{self.source} gives {getattr(z, 'shape', type(z).__name__)} for {len(x)} records; features (N, d),"
                " tokens (N, T, d) or maps (N, C, H, W) are needed"
            )
        if z.dim() == 3:
            z = z.mean(1)  # of the tokens
        return (z if z.dim() == 4 else z[:, :, None, None]).float()


@lru_cache(maxsize=4)
def _module(source: str) -> nn.Module:
    made = own(source)()
    if not isinstance(made, nn.Module):
        raise ParameterError(f"{source} returned a {type(made).__name__}; a torch.nn.Module is needed")
    return made.eval().requires_grad_(False)


def _has(made: Any, key: str) -> bool:
    return hasattr(made, "keys") and key in made.keys()  # noqa: SIM118 - an output of transformers, no dict
