"""Losses of one sample that state their Lipschitz constant, and the counterparts of torch's losses.

CrossEntropyLoss: TauCrossEntropy, with probabilities as targets SoftCrossEntropy. BCEWithLogitsLoss: TauBCEWithLogits.
NLLLoss: NegativeLogLikelihood. L1Loss: MeanAbsoluteError. MSELoss: MeanSquaredError. HuberLoss: Huber. SmoothL1Loss:
    SmoothL1.
With labels (N, H, W) for logits (N, C, H, W): PerPixel of these, which stands for them by itself.
MultiMarginLoss: MultiMargin. SoftMarginLoss, MultiLabelSoftMarginLoss: SoftMargin, TauBCEWithLogits.
"""

from lipdp.losses.base import LipschitzLoss
from lipdp.losses.columns import Huber, MeanAbsoluteError, MeanSquaredError, SmoothL1, SoftMargin, TauBCEWithLogits
from lipdp.losses.criteria import as_lipschitz
from lipdp.losses.labels import CosineSimilarity, NegativeLogLikelihood, SoftCrossEntropy, TauCrossEntropy
from lipdp.losses.margin import HKR, CategoricalHinge, MulticlassHinge, MultiMargin
from lipdp.losses.pixels import PerPixel

__all__ = [
    "HKR",
    "CategoricalHinge",
    "CosineSimilarity",
    "Huber",
    "LipschitzLoss",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "MultiMargin",
    "MulticlassHinge",
    "NegativeLogLikelihood",
    "PerPixel",
    "SmoothL1",
    "SoftCrossEntropy",
    "SoftMargin",
    "TauBCEWithLogits",
    "TauCrossEntropy",
    "as_lipschitz",
]
