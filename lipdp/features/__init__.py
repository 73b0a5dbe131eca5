"""Fixed, data-independent feature maps as a stage of the data pipeline: computed once, kept on disk.

    split = apply(load("mnist"), features("scattering"))

A map and its normalisation treat each record alone and learn nothing, so they cost no privacy: replacing a record
changes its own features and no other's.
"""

from lipdp.features.frozen import Frozen
from lipdp.features.maps import NORM_FLOOR, Dct, FeatureMap, FeatureSpec, apply, features

__all__ = ["NORM_FLOOR", "Dct", "FeatureMap", "FeatureSpec", "Frozen", "apply", "features"]
