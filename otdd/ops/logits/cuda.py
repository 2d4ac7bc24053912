"""The `cuda` backend of `logit_transport`: a call of several launches in each direction."""

import math

import torch
from torch import Tensor

from otdd.ops import checks, pointers


def logits_cuda(
    student: Tensor, teacher: Tensor, tau: float, eps: float, max_iter: int, sinkd: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cost, p, q, C, f and g from logits in any type: both softmaxes, the costs, the solve."""
    *batch, N, D = student.shape
    dtype = checks.wide(student.dtype)
    shapes = batch, student.shape, student.shape, (*batch, N, N), (*batch, N), (*batch, N)
    cost, p, q, C, f, g = (student.new_empty(shape, dtype=dtype) for shape in shapes)
    sizes = math.prod(batch), N, D
    student, teacher = map(pointers.with_rows, pointers.flat(len(batch), student, teacher))
    device, stream = pointers.place(student)
    space = pointers.workspace(p, "logits", *sizes)
    status = pointers.cuda_kernel("logits", dtype)(
        device,
        stream,
        student,
        teacher,
        tau,
        eps,
        1.0 if sinkd else 0.0,
        max_iter,
        *(p, q, C, f, g, cost),
        space,
    )
    pointers.check_cuda(status, "logit_transport")
    return cost, p, q, C, f, g


def logits_backward_cuda(
    dcost: Tensor,
    p: Tensor,
    q: Tensor,
    C: Tensor,
    f: Tensor,
    g: Tensor,
    tau: float,
    eps: float,
    sinkd: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the student's logits, in their type; no plan is stored."""
    *batch, N, D = p.shape
    dstudent = p.new_empty(p.shape, dtype=dtype)
    sizes = math.prod(batch), N, D
    (dcost,) = pointers.flat(len(batch), dcost)
    p, q, C, f, g = (t.contiguous() for t in (p, q, C, f, g))  # as they are, but for transforms
    device, stream = pointers.place(p)
    space = pointers.workspace(p, "logits_backward", *sizes)
    status = pointers.cuda_kernel("logits_backward", p.dtype)(
        device,
        stream,
        *(p, q, C, f, g),
        dcost,
        tau,
        eps,
        1.0 if sinkd else 0.0,
        dstudent,
        space,
    )
    pointers.check_cuda(status, "logit_transport's backward")
    return dstudent
