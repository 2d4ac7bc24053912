"""Optimal-transport guidance of a diffusion sampler.

`OTGuidance` is a plain object for any sampling loop: give it real latents with `set_reference`,
then call it on x0_hat or z_t. For every class it solves one entropic transport problem between
the latents in flight (with those finished before) and the real ones,

    P = sinkhorn(C(z_n, x_j), eps = lambda_1 * std(C)),

and moves each latent by one of two forms. With T(z_n) = sum_j P_nj x_j / sum_j P_nj,

    projection:  z <- z + strength * (T(z) - z)
    gradient:    z <- z - strength * rho_t * g,   g_n = sum_j P_nj grad_z c(z_n, x_j), P held fixed,
                 rho_t = 0.0015 * rms(model output) * sqrt(1 - alpha_bar_t) / rms(g)

(for the L1 cost g_n = sum_j P_nj sign(z_n - x_j); rho_t is that of influence-guided diffusion).
With `repulsion` = kappa > 0 the real latents R of the other classes in the call push away: the
projection is T + kappa * (T - R(T)), where R(z) = sum_j softmax_j(-c(z, x_j) / std(C)) x_j over
them, and the gradient form subtracts kappa times the gradient of the cost weighted by that softmax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from otdd.distill.config import GuidanceConfig
from otdd.distill.terms import Guidance, Memory, check_latents, group_classes, rng
from otdd.ops import barycentric, cost_matrix, sinkhorn


@dataclass(frozen=True)
class _Padded:
    """Rows grouped by class: `rows` (K, N, D), `weights` (K, N) with zeros at the padding."""

    rows: Tensor
    weights: Tensor
    slots: Tensor  # of the input rows, in the flattened (K * N)


@dataclass(frozen=True)
class _Finished:
    """Costs (K, L, M) from the finished latents of a call, which stay where they are, and weights.

    They are made once for all the denoising steps of the same `memory` and classes.
    """

    costs: Tensor
    weights: Tensor
    key: tuple[object, ...]

    def serves(self, key: tuple[object, ...]) -> bool:
        """Whether the costs are those of the very same tensors and values."""
        pairs = zip(self.key, key, strict=True)
        return all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in pairs)


class OTGuidance(Guidance):
    """Guides latents of each class towards the distribution of its real latents.

    Args:
        config: target, form, cost and strength; the defaults are those that measured best.
        seed: of the choice of reference latents and of the noise of the `q_sample` target.
    """

    def __init__(self, config: GuidanceConfig | None = None, *, seed: int = 0) -> None:
        self.config = config or GuidanceConfig()
        self.seed = seed
        self._classes: list[int] = []
        self._reference: _Padded | None = None
        self._finished: _Finished | None = None

    def set_reference(self, latents: Tensor, class_labels: Tensor) -> None:
        """Takes the real latents.

        Args:
            latents: (R, ...), finite; at most `reference_size` of each class are kept.
            class_labels: integers, (R,).
        """
        check_latents(latents, class_labels, "latents")
        keep = pick_reference(class_labels, self.config.reference_size, self.seed)
        latents, class_labels = latents[keep], class_labels[keep]
        self._classes, groups = group_classes(class_labels)
        self._reference = _pad(latents.flatten(1).float(), groups, len(self._classes))
        self._finished = None
        self._shape = tuple(latents.shape[1:])

    @property
    def normalised(self) -> bool:
        """Steps of the gradient form are scaled by rho_t."""
        return self.config.form == "gradient"

    def check(self, class_labels: Tensor, shape: tuple[int, ...]) -> None:
        """Raises if there is no reference for latents of this shape and these classes."""
        if self._reference is None:
            raise RuntimeError("OTGuidance has no reference yet: call set_reference first")
        if tuple(shape) != tuple(self._shape):
            raise ValueError(f"x has latents of {tuple(shape)}, the reference has {self._shape}")
        missing = sorted(set(class_labels.tolist()) - set(self._classes))
        if missing:
            raise ValueError(f"classes {missing} have no reference latents; give them all")

    def direction(
        self,
        x: Tensor,
        t: int | Tensor,
        class_labels: Tensor,
        *,
        alpha_bar: float | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """What lowers the transport cost when subtracted: x - T(x), or the gradient g."""
        check_latents(x, class_labels, "x")
        self.check(class_labels, tuple(x.shape[1:]))
        present, groups = group_classes(class_labels)
        moving = _pad(x.detach().flatten(1).float(), groups, len(present))
        y, b = self._real(present, x.device)
        if self.config.target == "q_sample":
            y = self._noised(y, present, int(t), alpha_bar)
        finished = self._finish(memory, present, y)
        move = self._solve(moving, finished, y, b)
        return move.flatten(0, 1)[moving.slots].view_as(x).to(x.dtype)

    def transport_cost(self, x: Tensor, class_labels: Tensor) -> Tensor:
        """Cost <P, C> of each class present, in the order of their labels; (K,)."""
        present, groups = group_classes(class_labels)
        sources = _pad(x.detach().flatten(1).float(), groups, len(present))
        y, b = self._real(present, x.device)
        C = cost_matrix(sources.rows, y, self.config.metric)
        eps = self._eps(C, sources.weights, b)
        return sinkhorn(C, sources.weights, b, eps=eps, max_iter=self.config.max_iter).cost

    def _real(self, present: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Real latents (K, M, D) of the classes present, and their weights (K, M)."""
        assert self._reference is not None  # `check` has seen to it
        rows, weights = self._reference.rows, self._reference.weights
        if present != self._classes:  # else no copy: a run refers to just the classes in flight
            index = torch.tensor([self._classes.index(k) for k in present], device=rows.device)
            rows, weights = rows[index], weights[index]
        return rows.to(device), weights.to(device)

    def _solve(self, moving: _Padded, finished: _Finished | None, y: Tensor, b: Tensor) -> Tensor:
        x, kappa = moving.rows, self.config.repulsion if len(y) > 1 else 0.0
        gradient, count = self.config.form == "gradient", x.shape[1]
        with torch.set_grad_enabled(gradient):
            x = x.detach().requires_grad_(gradient)
            C = cost_matrix(x, y, self.config.metric)
            costs, a = C.detach(), moving.weights
            if finished is not None:
                costs = torch.cat([costs, finished.costs], 1)
                a = (torch.cat([a, finished.weights], 1) > 0).to(a.dtype)
                a = a / a.sum(1, keepdim=True)
            eps = self._eps(costs, a, b)
            result = sinkhorn(costs, a, b, eps=eps, max_iter=self.config.max_iter)
            a = a[:, :count]
            if not gradient:
                potentials = result.f[:, :count], result.g
                image = barycentric(potentials, y, C=costs[:, :count], eps=eps, a=a, b=b)
                if kappa:
                    others, near = self._others(image, y, b, eps / self.config.lambda_1)
                    image = image + kappa * (image - near @ others)
                return x - image
            objective = (result.plan[:, :count] * C).sum()
            if kappa:
                others, near = self._others(x.detach(), y, b, eps / self.config.lambda_1)
                away = near * cost_matrix(x, others, self.config.metric)
                objective = objective - kappa * (a[..., None] * away).sum()
            return torch.autograd.grad(objective, x)[0]

    def _others(self, x: Tensor, y: Tensor, b: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Real latents of all classes (K * M, D), and how near those of others are (K, N, K * M).

        Nearness sums to 1: softmax_j(-C_nj / std(C)) over the latents of the other classes.
        """
        classes, width, _ = y.shape
        others = y.flatten(0, 1)
        own = torch.arange(classes, device=y.device).repeat_interleave(width)
        barred = (own == torch.arange(classes, device=y.device)[:, None]) | (b.flatten() == 0)
        C = cost_matrix(x, others, self.config.metric)
        scores = (-C / spread[:, None, None]).masked_fill(barred[:, None], -torch.inf)
        return others, scores.softmax(-1)

    def _eps(self, C: Tensor, a: Tensor, b: Tensor) -> Tensor:
        valid = (a > 0)[:, :, None] & (b > 0)[:, None, :]
        count = valid.sum((1, 2))
        mean = (C * valid).sum((1, 2)) / count
        spread = ((C - mean[:, None, None]).square() * valid).sum((1, 2)) / count
        floor = 1e-6 * mean.abs() + 1e-12  # a single pair has no spread
        return self.config.lambda_1 * spread.sqrt().maximum(floor)

    def _noised(self, y: Tensor, present: list[int], t: int, alpha_bar: float | None) -> Tensor:
        if alpha_bar is None:
            raise ValueError("alpha_bar is needed by the target 'q_sample'")
        noise = [
            torch.randn(y.shape[1:], generator=rng(self.seed, "q_sample", label, t))
            for label in present
        ]
        return alpha_bar**0.5 * y + (1 - alpha_bar) ** 0.5 * torch.stack(noise).to(y.device)

    def _finish(self, memory: Memory | None, present: list[int], y: Tensor) -> _Finished | None:
        """Costs from the latents finished before to the real ones, if there are any."""
        if memory is None or len(memory[0]) == 0:
            return None
        versions = tuple(t._version for t in memory)
        noised = y if self.config.target == "q_sample" else None  # other targets at every step
        key = (*memory, *versions, tuple(present), noised)
        if self._finished is None or not self._finished.serves(key):
            rows, groups = self._recent(memory, present)
            if len(rows) == 0:
                return None
            padded = _pad(rows, groups, len(present))
            costs = cost_matrix(padded.rows, y, self.config.metric)
            self._finished = _Finished(costs, padded.weights, key)
        return self._finished

    def _recent(self, memory: Memory, present: list[int]) -> tuple[Tensor, Tensor]:
        latents, labels = memory
        rows, groups = [], []
        for group, label in enumerate(present):
            own = latents[labels == label][-self.config.memory :]
            rows.append(own.detach().flatten(1).float())
            groups.append(torch.full((len(own),), group, device=labels.device))
        return torch.cat(rows), torch.cat(groups)


def pick_reference(class_labels: Tensor, size: int, seed: int) -> Tensor:
    """Indices of at most `size` elements of each class, drawn without replacement, in order."""
    kept = []
    for label in class_labels.unique().tolist():
        own = (class_labels == label).nonzero()[:, 0]
        if len(own) > size:
            draw = torch.randperm(len(own), generator=rng(seed, "reference", label))
            own = own[draw[:size].sort().values.to(own.device)]
        kept.append(own)
    return torch.cat(kept)


def _pad(rows: Tensor, groups: Tensor, count: int) -> _Padded:
    sizes = torch.bincount(groups, minlength=count)
    order = torch.argsort(groups, stable=True)
    rank = torch.arange(len(groups), device=rows.device)
    rank = rank - (sizes.cumsum(0) - sizes)[groups[order]]
    width = int(sizes.max())
    slots = torch.empty_like(order)
    slots[order] = groups[order] * width + rank
    # Padding repeats a real row, so that every cost (cosine too) stays finite there.
    first = order[(sizes.cumsum(0) - sizes).clamp_max(len(order) - 1)]  # of none: any row
    index = first[:, None].expand(-1, width).reshape(-1).clone()
    index[slots] = torch.arange(len(groups), device=rows.device)
    weights = rows.new_zeros(count * width)
    weights[slots] = 1 / sizes[groups].to(rows.dtype)
    return _Padded(rows[index].view(count, width, -1), weights.view(count, width), slots)
