"""Generative dataset distillation guided by optimal transport.

Stages are functions from store to store: `sample` makes images, `relabel` soft labels, `evaluate`
trains students; `run` does all of them. `OTDiTPipeline` and the guidance objects are for sampling
of one's own. What needs torch or diffusers loads when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from otdd.distill.config import (
    ConfigError,
    DiversityConfig,
    GuidanceConfig,
    InfluenceConfig,
    ModeConfig,
    RelabelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from otdd.distill.settings import resolve
from otdd.distill.store import Store, StoreError

if TYPE_CHECKING:
    from otdd.distill.denoiser import Denoiser
    from otdd.distill.denoising import Guides, denoise
    from otdd.distill.dit import OTDiTPipeline
    from otdd.distill.diversity import DiversityGuidance
    from otdd.distill.guidance import OTGuidance
    from otdd.distill.influence import InfluenceGuidance
    from otdd.distill.modes import ModeGuidance
    from otdd.distill.pipeline import run
    from otdd.distill.task import OTDistillationTask
    from otdd.distill.terms import Guidance

_LAZY = {
    "Denoiser": "denoiser",
    "DiversityGuidance": "diversity",
    "Guidance": "terms",
    "Guides": "denoising",
    "InfluenceGuidance": "influence",
    "ModeGuidance": "modes",
    "OTDiTPipeline": "dit",
    "OTDistillationTask": "task",
    "OTGuidance": "guidance",
    "denoise": "denoising",
    "run": "pipeline",
}

__all__ = [
    "ConfigError",
    "Denoiser",
    "DiversityConfig",
    "DiversityGuidance",
    "Guidance",
    "GuidanceConfig",
    "Guides",
    "InfluenceConfig",
    "InfluenceGuidance",
    "ModeConfig",
    "ModeGuidance",
    "OTDiTPipeline",
    "OTDistillationTask",
    "OTGuidance",
    "RelabelConfig",
    "RunConfig",
    "SampleConfig",
    "Store",
    "StoreError",
    "TrainConfig",
    "denoise",
    "resolve",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
