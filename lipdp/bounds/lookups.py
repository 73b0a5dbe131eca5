"""The rules of embeddings: tokens (whole numbers) that are looked up in a table of weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lipdp.bounds.rules import Call, Local, Number, rule
from lipdp.errors import UnsupportedLayerError


def _looked_up(call: Call, tokens: int, value: Number, longest: Number, gain: float) -> Local:
    """‖y‖ ≤ `value`, ‖∇_W‖ ≤ `gain` ‖g‖. No cotangent reaches the tokens, which have no gradient.

    Two records that differ in k tokens are √k apart at least, and their rows 2 max_r ‖W_r‖: that is the Lipschitz
    constant, on whole numbers, for each of the places where a token is used.
    """
    uses = math.sqrt(max(1.0, tokens / call.x.numel))
    return Local(
        gains=(uses * 2 * longest,) if call.module is not None else (uses * 2 * longest, gain),
        offset=value,
        value_cap=value,
        parameters={"weight": gain},
        sums_in=torch.float32,
        fan_in=tokens,
    )


def _refuse(call: Call, **options: Any) -> None:
    why = {
        "max_norm": "changes the table in the forward pass, by the tokens of the batch; leave it out",
        "scale_grad_by_freq": "divides by the number of a token in the batch, which couples records; leave it out",
        "sparse": "gives sparse gradients, which show the tokens of the batch and take no noise; leave it out",
        "per_sample_weights": "are a second input, whose size nothing bounds; leave them out",
        "offsets": "make a record of a part of the tokens; give (N, n) tokens, n for each record (padding_idx=)",
    }
    for name, value in options.items():
        if value is not None and value is not False:
            raise UnsupportedLayerError(f"'{call.name}': {name} {why[name]}")


@rule(nn.Embedding, F.embedding)
def _embedding(call: Call) -> Local:
    """n rows of the table: ‖y‖ ≤ √n max ‖W_r‖. Of n equal tokens the gradients meet in one row: ‖Σ_t g_t‖ ≤ √n ‖g‖."""
    layer: Any = call.module
    if layer is None:
        options = {
            "max_norm": call.argument(3, "max_norm"),
            "scale_grad_by_freq": call.argument(5, "scale_grad_by_freq"),
        }
        options["sparse"], weight = call.argument(6, "sparse"), call.argument(1, "weight").constant
    else:
        options = {name: getattr(layer, name) for name in ("max_norm", "scale_grad_by_freq", "sparse")}
        weight = layer.weight
    _refuse(call, **options)
    longest = torch.linalg.vector_norm(weight.detach().double(), dim=1).amax()
    tokens = math.prod(call.output_shape) // weight.shape[1]
    root = math.sqrt(tokens)
    return _looked_up(call, tokens, root * longest, longest, root)


@rule(nn.EmbeddingBag)
def _embedding_bag(call: Call) -> Local:
    """The mean, sum or maximum of n rows. Row r is there c_r times, Σ c_r ≤ n.

    Mean: ‖y‖ ≤ max ‖W_r‖, ‖∇_W‖² = Σ (c_r/Σc)² ‖g‖² ≤ ‖g‖². Sum: n times that. Maximum: an entry of y is that of one
    row, so ‖∇_W‖ ≤ ‖g‖ and ‖y‖ ≤ ‖(max_r |W_rj|)_j‖.
    """
    layer: Any = call.module
    names = ("max_norm", "scale_grad_by_freq", "sparse")
    _refuse(call, **{name: getattr(layer, name) for name in names})
    others = [(1, "offsets"), (2, "per_sample_weights")]
    _refuse(call, **{name: call.argument(place, name) for place, name in others})
    weight, tokens = layer.weight.detach().double(), call.x.numel
    longest = torch.linalg.vector_norm(weight, dim=1).amax()
    if layer.mode == "max":
        widest = torch.linalg.vector_norm(weight.abs().amax(0))
        return _looked_up(call, tokens, widest, widest, 1.0)
    gain = float(tokens) if layer.mode == "sum" else 1.0
    return _looked_up(call, tokens, gain * longest, gain * longest, gain)
