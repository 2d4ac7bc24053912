"""Differentiable optimal-transport ops on PyTorch tensors."""

from otdd.ops.barycentric import barycentric
from otdd.ops.cost import METRICS, cost_matrix
from otdd.ops.divergence import Divergence, sinkhorn_divergence
from otdd.ops.partial import PartialResult, partial
from otdd.ops.points import sinkhorn_points
from otdd.ops.points.result import PointsResult
from otdd.ops.sinkhorn import SinkhornResult, sinkhorn

__all__ = [
    "METRICS",
    "Divergence",
    "PartialResult",
    "PointsResult",
    "SinkhornResult",
    "barycentric",
    "cost_matrix",
    "partial",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_points",
]
