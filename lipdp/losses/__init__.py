"""Losses of one sample that state their Lipschitz constant, and the counterparts of torch's losses.

CrossEntropyLoss: TauCrossEntropy, with probabilities as targets SoftCrossEntropy. BCEWithLogitsLoss: TauBCEWithLogits.
NLLLoss: NegativeLogLikelihood. L1Loss: MeanAbsoluteError. MSELoss: MeanSquaredError. HuberLoss: Huber. SmoothL1Loss:
    SmoothL1.
MultiMarginLoss: MultiMargin. SoftMarginLoss, MultiLabelSoftMarginLoss: SoftMargin, TauBCEWithLogits.
"""

from lipdp.losses.base import LipschitzLoss
from lipdp.losses.columns import Huber, MeanAbsoluteError, MeanSquaredError, SmoothL1, SoftMargin, TauBCEWithLogits
from lipdp.losses.criteria import as_lipschitz
from lipdp.losses.labels import CosineSimilarity, NegativeLogLikelihood, SoftCrossEntropy, TauCrossEntropy
from lipdp.losses.margin import HKR, CategoricalHinge, MulticlassHinge, MultiMargin

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
    "SmoothL1",
    "SoftCrossEntropy",
    "SoftMargin",
    "TauBCEWithLogits",
    "TauCrossEntropy",
    "as_lipschitz",
]
