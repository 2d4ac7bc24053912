"""Imports torchvision where a CPU-only torch meets a torchvision built for CUDA.

There the compiled part of torchvision does not load, its operators stay undeclared and
`import torchvision` fails with "operator torchvision::nms does not exist" (pytorch/vision #9077),
and with it timm and diffusers. Declaring the two operators lets the import finish: models,
transforms and datasets work, only the box operators raise when called. Call `repair`
before importing anything that imports torchvision.
"""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

import torch

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
SYMPTOM = "operator torchvision::nms does not exist"


@functools.cache
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")  # lives as long as the cache
    for name in ("nms", "qnms"):
        library.define(name + SCHEMA)
    return library


def repair() -> ModuleType:
    """Import torchvision, repaired if it needs it, and return it; other errors pass through."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if SYMPTOM not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half-imported
    _declare_operators()
    return importlib.import_module("torchvision")
