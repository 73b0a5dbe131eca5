"""The rule of attention whose scores are bounded."""

from __future__ import annotations

import math
from functools import lru_cache

from lipdp.bounds.rules import Call, Local, least, rule, times
from lipdp.errors import UnsupportedOperationError
from lipdp.nn.attention import BoundedAttention


@lru_cache(maxsize=1024)
def spread(sharpness: float, keys: int) -> tuple[float, float]:
    """J and ρ for scores in [−β, β]: bounds on ‖diag(p) − ppᵀ‖₂ and on ‖p‖² of the rows p of T probabilities."""
    small = math.exp(-2 * sharpness)  # the least of the probabilities over the largest
    if keys == 1:
        return 0.0, 1.0
    levels = ((m, keys - m) for m in range(1, keys + 1))
    square = max((m + rest * small**2) / (m + rest * small) ** 2 for m, rest in levels)
    slack = 1 + 1e-12 * keys
    return min(0.5, slack / (1 + (keys - 1) * small)), min(1.0, slack * square)


@rule(BoundedAttention)
def _bounded_attention(call: Call) -> Local:
    """As `BoundedAttention` derives them: (β/b) √J X min(1, √J X_k/b), (β/b) J X min(√S, X_q/b) and √(S ρ)."""
    layer: BoundedAttention = call.module  # type: ignore[assignment]
    queries, keys, values = call.inputs
    shapes = [source.shape if source.constant is None else source.shape[1:] for source in call.inputs]
    if any(len(shape) != 2 for shape in shapes) or any(s.constant is not None and s.shape[0] > 1 for s in call.inputs):
        raise UnsupportedOperationError(
            f"'{call.name}' attends from tokens (N, S, d) to tokens (N, T, d); tensors of the model itself are"
            f" (1, T, d), got {', '.join(str(source.shape) for source in call.inputs)} without the batch"
        )
    count, size = shapes[0][0], shapes[1][0]
    variance, square = spread(layer.sharpness, size)
    slope = times(layer.sharpness / layer.bound, values.value)
    root = math.sqrt(variance)
    by_query = times(times(slope, root), least(1.0, times(root / layer.bound, keys.value)))
    by_key = times(times(slope, variance), least(math.sqrt(count), times(1 / layer.bound, queries.value)))
    gain = math.sqrt(count * square)
    return Local(
        gains=(by_query, by_key, gain),
        value_cap=times(gain, values.value),
        fan_in=max(size, shapes[0][-1], shapes[2][-1]) + 64,
    )
