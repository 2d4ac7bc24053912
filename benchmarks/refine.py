"""Refinements of finished latents by transport, in search of what beats k-means centroids (ours).

`REFINED` names, by variant of `ablation_guidance.py`, the set it starts from and what is done:

* a list of lambda_1: so many steps of the barycentric projection of the guidance at strength 1, all
  images of a class at once, with its repulsion; `annealed` lowers lambda_1 on the way. `+repulsion`
  is a single step at a small lambda_1, which changes k-means centroids by little but repulsion.
* `features`: gradient steps (Adam) on the transport cost of each class in the features of a teacher
  before its last layer, added to that of the latents, both in units of their spread: the ground
  metric discriminates.
"""

import torch
from torch import Tensor, nn

from otdd.distill.config import GuidanceConfig, RelabelConfig, RunConfig
from otdd.distill.data import ImageData
from otdd.distill.generator import Generator
from otdd.distill.guidance import OTGuidance
from otdd.distill.relabel import make_teachers
from otdd.distill.store import Store
from otdd.ops import cost_matrix, sinkhorn

FEATURES = "features"
REFINED: dict[str, tuple[str, str | tuple[float, ...]]] = {
    "default+ot": ("default", (0.1,) * 10),
    "starts-4+repulsion": ("starts-4", (0.03,)),
    "default+annealed": ("default", (1.0, 0.6, 0.3, 0.2, 0.1, 0.06, 0.03, 0.03, 0.03, 0.03)),
    "default+features": ("default", FEATURES),
    "kmeans+repulsion": ("kmeans", (0.03,)),
    "kmeans+features": ("kmeans", FEATURES),
}
STEPS, RATE = 100, 0.02


def refine(
    how: str | tuple[float, ...],
    latents: Tensor,
    labels: Tensor,
    data: ImageData,
    generator: Generator,
    work: str,
) -> Tensor:
    """Images (N, C, H, W) uint8 of the refined latents (N, c, h, w); `work` keeps the teacher."""
    real = generator.codec.encode(data.train.images)
    if how == FEATURES:
        latents = _by_features(latents, labels, real, data, generator, work)
    else:
        for width in how:
            settings = {"lambda_1": width, "strength": 1.0, "reference_size": 2000, "detail": 0.0}
            term = OTGuidance(GuidanceConfig(**settings))
            term.set_reference(real, data.train.labels)
            latents = latents - term.direction(latents, 0, labels)
    return generator.codec.decode(latents)


def _by_features(
    latents: Tensor,
    labels: Tensor,
    real: Tensor,
    data: ImageData,
    generator: Generator,
    work: str,
) -> Tensor:
    config = RunConfig(data.name, 1, work, relabel=RelabelConfig(("convnet",)))
    teacher = make_teachers(Store(work), data, config)[0].network
    x = latents.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=RATE)
    with torch.no_grad():
        known = [_spaces(real[data.train.labels == k], teacher, generator) for k in labels.unique()]
    scales = [[y.var(0).sum() for y in spaces] for spaces in known]
    for _ in range(STEPS):
        loss = x.new_zeros(())
        for k, spaces, scale in zip(labels.unique(), known, scales, strict=True):
            mine = _spaces(x[labels == k], teacher, generator)
            for own, y, spread in zip(mine, spaces, scale, strict=True):
                C = cost_matrix(own, y, "sqeuclidean") / spread
                loss = loss + sinkhorn(C, eps=0.05, max_iter=20).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return x.detach()


def _spaces(latents: Tensor, teacher: nn.Module, generator: Generator) -> list[Tensor]:
    """Latents and features of a teacher, each (N, D)."""
    images = generator.codec.pixels(latents)
    body = teacher.body.features((images - teacher.mean) / teacher.std)
    return [latents.flatten(1), body.flatten(1)]
