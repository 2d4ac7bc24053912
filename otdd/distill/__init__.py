"""Generative dataset distillation guided by optimal transport.

Stages are functions from store to store: `sample` makes images, `relabel` soft labels, `evaluate`
trains students; `otdd.distill.pipeline.run` does all of them.
"""

from __future__ import annotations

from otdd.distill.config import (
    ConfigError,
    GuidanceConfig,
    RelabelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from otdd.distill.settings import resolve
from otdd.distill.store import Store, StoreError

__all__ = [
    "ConfigError",
    "GuidanceConfig",
    "RelabelConfig",
    "RunConfig",
    "SampleConfig",
    "Store",
    "StoreError",
    "TrainConfig",
    "resolve",
]
