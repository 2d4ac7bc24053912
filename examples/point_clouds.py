"""Point clouds: a flow along the gradient of the Sinkhorn divergence, and outliers.

Run: python examples/point_clouds.py
"""

import torch

from otdd import ops
from otdd.losses import SinkhornLoss

torch.manual_seed(0)
angles = 2 * torch.pi * torch.rand(200)
ring = torch.stack([angles.cos(), angles.sin()], 1)

# The divergence is zero at equality, so its gradient flow ends at the target and does not shrink
# towards its mean, as it does with debias=False.
loss_fn = SinkhornLoss("sqeuclidean", eps=0.05, max_iter=50)
cloud = 0.1 * torch.randn(150, 2)
losses = []
for _ in range(30):
    cloud.requires_grad_()
    loss = loss_fn(cloud, ring)
    (gradient,) = torch.autograd.grad(loss, cloud)
    # Each of N points has weight 1 / N, so its gradient has that factor too.
    cloud = (cloud - 0.4 * len(cloud) * gradient).detach()
    losses.append(loss.item())
radius = cloud.norm(dim=1)
print(f"divergence: {losses[0]:.3f} at the start, {losses[-1]:.5f} at the end")
print(f"radius: {radius.mean():.2f} +- {radius.std():.2f} (the ring's is 1)")

# One target in ten lies far off. Balanced transport has to reach it; with a penalty rho on the
# marginals in its place, mass that is too dear to move is left where it is.
outliers = torch.cat([ring[:180], torch.full((20, 2), 10.0)])
costs = {}
for rho in (None, 1.0):
    result = ops.sinkhorn_points(ring, outliers, eps=0.05, rho_a=rho, rho_b=rho, max_iter=500)
    costs[rho] = result.cost.item()
    print(f"rho={rho}: transport cost {costs[rho]:.3f}, mass {result.plan.sum():.3f}")

# Clouds whose costs would not fit: sinkhorn_points makes them tile by tile.
large, other = torch.randn(3000, 3), torch.randn(4000, 3)
print(f"3000 x 4000: {ops.sinkhorn_points(large, other, eps=0.5, max_iter=10).value:.3f}")
