"""From a configuration to the data of a run."""

from __future__ import annotations

from lipdp.config import TrainConfig
from lipdp.data import Split, bound_inputs, bounding, default_bounding, load
from lipdp.features import Progress, apply, features


def prepare(config: TrainConfig, *, progress: Progress | None = None) -> tuple[Split, float | None]:
    """The data of a run: read, bounded by public constants, turned into features.

    Returns:
        The split, and a bound on the norm of its inputs where the features have one.
    """
    split = load(config.dataset, data_dir=config.data_dir, download=config.download)
    if config.bounding is None:
        split = bound_inputs(split, default_bounding(split))
    else:
        split = bound_inputs(split, bounding(config.bounding, **config.bounding_options))
    if config.features is None:
        return split, None
    spec = features(config.features, **config.feature_options)
    bound = spec.norm_bound(split.input_shape)
    return apply(split, spec, progress=progress), bound
