"""Which records take part in a step: samplers, population, owners, loader."""

from lipdp.lazy import facade

_NAMES = {
    "BatchLoader": "lipdp.batches.loader",
    "FixedSizeSampler": "lipdp.batches.samplers",
    "Owners": "lipdp.batches.owners",
    "PoissonSampler": "lipdp.batches.samplers",
    "Population": "lipdp.batches.population",
    "Sampler": "lipdp.batches.samplers",
    "TruncatedPoissonSampler": "lipdp.batches.samplers",
    "bounded_contributions": "lipdp.batches.owners",
    "in_order": "lipdp.batches.reading",
    "per_record": "lipdp.batches.per_record",
}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
