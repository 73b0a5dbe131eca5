"""Layers with certified norms. Layers that deel-torchlip has too keep its names."""

from lipdp.nn.activation import BetaAbs, FullSort, GroupSort, GroupSort2, HouseHolder, LPReLU, MaxMin
from lipdp.nn.attention import BoundedAttention, SpectralAttention
from lipdp.nn.constrained import Constrained, project_
from lipdp.nn.conv import SpectralConv1d, SpectralConv2d
from lipdp.nn.convert import from_torchlip, to_torch
from lipdp.nn.gates import GradientGate, InputBound, ValueClip
from lipdp.nn.linear import FrobeniusLinear, SpectralLinear
from lipdp.nn.normalization import GroupNorm, LayerCentering, LayerNorm
from lipdp.nn.plain import Scale
from lipdp.nn.pooling import (
    InvertibleDownSampling,
    InvertibleUpSampling,
    ScaledAdaptiveAvgPool2d,
    ScaledAvgPool2d,
    ScaledL2NormPool2d,
)
from lipdp.nn.port import constrain, from_torch, porting_table
from lipdp.nn.residual import Concat, LipResidual, Residual
from lipdp.nn.shift import SpatialShift
from lipdp.nn.table import TableFeatures

__all__ = [
    "BetaAbs",
    "BoundedAttention",
    "Concat",
    "Constrained",
    "FrobeniusLinear",
    "FullSort",
    "GradientGate",
    "GroupNorm",
    "GroupSort",
    "GroupSort2",
    "HouseHolder",
    "InputBound",
    "InvertibleDownSampling",
    "InvertibleUpSampling",
    "LPReLU",
    "LayerCentering",
    "LayerNorm",
    "LipResidual",
    "MaxMin",
    "Residual",
    "Scale",
    "ScaledAdaptiveAvgPool2d",
    "ScaledAvgPool2d",
    "ScaledL2NormPool2d",
    "SpatialShift",
    "SpectralAttention",
    "SpectralConv1d",
    "SpectralConv2d",
    "SpectralLinear",
    "TableFeatures",
    "ValueClip",
    "constrain",
    "from_torch",
    "from_torchlip",
    "porting_table",
    "project_",
    "to_torch",
]
