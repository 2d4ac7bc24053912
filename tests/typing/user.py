"""What a user writes; checked by `mypy --strict` against the installed package, and never run."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor, nn

import otdd
from otdd import distill, losses, ops
from otdd.compat.geomloss import SamplesLoss
from otdd.distill import (
    Denoiser,
    DiversityConfig,
    DiversityGuidance,
    Guidance,
    GuidanceConfig,
    Guides,
    OTDistillationTask,
    OTDiTPipeline,
    OTGuidance,
    RunConfig,
    denoise,
    resolve,
)
from otdd.distill.artefact import DistilledSet


def use_ops(x: Tensor, y: Tensor) -> Tensor:
    C = ops.cost_matrix(x, y, metric="l1")
    assert_type(C, Tensor)
    solved = ops.sinkhorn(C, eps=0.1, max_iter=50, grad="implicit", rho_a=1.0)
    assert_type(solved, ops.SinkhornResult)
    again = ops.sinkhorn(C, eps=0.1, init=solved)
    assert_type(again.value, Tensor)
    points = ops.sinkhorn_points(x, y, eps=0.1, init=(solved.f, solved.g), precision="high")
    assert_type(points.plan, Tensor)
    assert_type(points.barycentric(y), Tensor)
    assert_type(ops.barycentric(solved, y), Tensor)
    assert_type(ops.partial(C, eps=0.1, mass=0.5), ops.PartialResult)
    assert_type(ops.sinkhorn_divergence(x, y, eps=0.1), ops.Divergence)
    ops.sinkhorn(C, eps=0.1, grad="exact")  # type: ignore[arg-type]
    ops.sinkhorn_points(x, y, epsilon=0.1)  # type: ignore[call-arg]
    return again.value + points.value


def use_losses(student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    loss = losses.OTDistillationLoss(ot=losses.OTLogitLoss(tau=2.0, eps=0.1))
    value: Tensor = loss(student, teacher, labels)
    value.backward()  # type: ignore[no-untyped-call]
    losses.SinkhornLoss(metric="l2", grad="unrolled")
    losses.DatasetDistance(labels="gaussian", num_classes=(3, 4))
    losses.OTLogitLoss(marginals="none")  # type: ignore[arg-type]
    SamplesLoss("sinkhorn", p=2, blur=0.05)


def use_a_set(folder: str, student: nn.Module) -> None:
    made = otdd.load(folder)
    assert_type(made, DistilledSet)
    assert_type(made.classes, list[str])
    for images, logits, targets, labels in made.replay(workers=2):
        student(made.normalise(images)), logits, targets, labels
    image, label = made[0]
    assert_type(label, int)
    assert_type(made.soft_labels, Tensor | None)
    print(image, label)


def use_runs() -> float:
    config = RunConfig(data="digits", ipc=1, out="runs/a", sets=("otg", "random"))
    metrics = distill.run(config)
    assert_type(resolve({"data": "digits", "ipc": 1, "out": "b"}), RunConfig)
    RunConfig(data="digits", ipc="1", out="runs/a")  # type: ignore[arg-type]
    return float(metrics["accuracy"][0]["mean"])


def use_guidance(pipe: OTDiTPipeline, latents: Tensor, labels: Tensor) -> None:
    guidance = OTGuidance(GuidanceConfig(target="x0", strength=0.3))
    guidance.set_reference(latents, labels)
    terms: list[Guidance] = [guidance, DiversityGuidance(DiversityConfig(strength=0.1))]
    pipe([0, 1], guidance=terms, num_inference_steps=10, output_type="latent")
    pipe(torch.tensor([0]), guidance=guidance, memory=(latents, labels))
    denoiser = Denoiser(pipe.transformer)

    def predict(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        return denoiser.predict(z, t, labels, guidance_scale=4.0)

    assert_type(denoise(predict, pipe.scheduler, latents, Guides([guidance], labels)), Tensor)
    OTDiTPipeline.from_pipe(pipe)


def use_a_task(student: nn.Module, teachers: list[nn.Module], images: Tensor) -> None:
    task = OTDistillationTask(student, teachers, losses.OTDistillationLoss())
    result = task(images, torch.zeros(len(images), dtype=torch.int64))
    result["loss"].backward()
    assert_type(task.train(), OTDistillationTask)
