"""Fixed, data-independent feature maps as a stage of the data pipeline: computed once, kept on disk.

    split = apply(load("mnist"), features("scattering"))

A map and its normalisation treat each record alone and learn nothing of any, so they cost no privacy: replacing a
record changes its own features and no other's. `photographs`, `objects` and `handwriting` learn filters and a whitening
from synthetic pictures, drawn from a public seed.
"""

from lipdp.features.cosine import Dct
from lipdp.features.energies import Energies
from lipdp.features.frozen import Frozen
from lipdp.features.maps import NORM_FLOOR, FeatureMap, FeatureSpec, apply, features
from lipdp.features.pictures import Handwriting, Objects, Pictures
from lipdp.features.synthetic import dead_leaves

__all__ = [
    "NORM_FLOOR",
    "Dct",
    "Energies",
    "FeatureMap",
    "FeatureSpec",
    "Frozen",
    "Handwriting",
    "Objects",
    "Pictures",
    "apply",
    "dead_leaves",
    "features",
]
