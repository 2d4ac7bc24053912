"""Many transport problems at once: a batch of different sizes, its plans and its gradients.

Run: python examples/sinkhorn_batch.py
"""

import torch

from otdd import ops

torch.manual_seed(0)

# 64 problems of up to 20 x 30 points. A weight of zero masks a point, so sizes may differ.
x, y = torch.randn(64, 20, 8), torch.randn(64, 30, 8) + 1
sizes = torch.randint(5, 21, (64, 1))
a = (torch.arange(20) < sizes).float()
a = a / a.sum(1, keepdim=True)

x.requires_grad_()
C = ops.cost_matrix(x, y, metric="l1")  # (64, 20, 30)
eps = 0.2 * C.detach().flatten(1).std(1)  # of each problem its own, in the units of its costs
result = ops.sinkhorn(C, a, eps=eps, max_iter=2000, tol=1e-5)
print(f"solved by the backend {result.backend}")
print(f"converged: {int(result.converged.sum())} of {len(C)}, after", result.n_iter.max().item())

# The plan is made when it is asked for; its rows are the weights, zeros where points are masked.
rows = result.plan.sum(-1)
print(f"largest error of a row: {(rows - a).abs().max().item():.1e}")

# `value` is the entropic objective, `cost` the transport cost <P, C> alone.
result.value.sum().backward()
masked = x.grad[a == 0].abs().max().item()
print(
    f"gradient of a real point: {x.grad[a > 0].norm(dim=-1).mean():.3f}; of a masked one: {masked}"
)

# A barycentric projection sends each source where the plan takes it.
images = ops.barycentric(result, y)
before = ops.cost_matrix(x.detach(), y).mean().item()
after = ops.cost_matrix(images, y).mean().item()
print(f"mean cost to the targets: {before:.2f} before, {after:.2f} after")

# A later solve of nearly the same problem starts from the potentials of the first.
warm = ops.sinkhorn(C.detach() + 0.01, a, eps=eps, max_iter=2000, tol=1e-5, init=result)
print(f"iterations, warm: {warm.n_iter.max().item()}")
