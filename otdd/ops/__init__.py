"""Differentiable optimal-transport ops on PyTorch tensors."""

from otdd.ops.barycentric import barycentric
from otdd.ops.cost import METRICS, cost_matrix
from otdd.ops.sinkhorn import SinkhornResult, sinkhorn

__all__ = ["METRICS", "SinkhornResult", "barycentric", "cost_matrix", "sinkhorn"]
