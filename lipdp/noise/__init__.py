"""How Gaussian noise is drawn and shared among parameters."""

from lipdp.lazy import facade

_NAMES = {
    "Allocation": "lipdp.noise.allocation",
    "GaussianNoise": "lipdp.noise.gaussian",
    "GlobalAllocation": "lipdp.noise.allocation",
    "MinVarianceAllocation": "lipdp.noise.allocation",
    "PerLayerAllocation": "lipdp.noise.allocation",
    "SecureGaussianNoise": "lipdp.noise.secure",
    "get_allocation": "lipdp.noise.allocation",
}

__getattr__, __dir__, __all__ = facade(__name__, _NAMES)
