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

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from otdd.distill.config import GuidanceConfig
from otdd.ops import barycentric, cost_matrix, sinkhorn

RHO = 0.0015


@dataclass(frozen=True)
class _Padded:
    """Rows grouped by class: `rows` (K, N, D), `weights` (K, N) with zeros at the padding."""

    rows: Tensor
    weights: Tensor
    slots: Tensor  # of the input rows, in the flattened (K * N)


class OTGuidance:
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

    def set_reference(self, latents: Tensor, class_labels: Tensor) -> None:
        """Takes the real latents.

        Args:
            latents: (R, ...), finite; at most `reference_size` of each class are kept.
            class_labels: integers, (R,).
        """
        _check(latents, class_labels, "latents")
        keep = pick_reference(class_labels, self.config.reference_size, self.seed)
        latents, class_labels = latents[keep], class_labels[keep]
        self._classes, groups = _groups(class_labels)
        self._reference = _pad(latents.flatten(1).float(), groups, len(self._classes))
        self._shape = latents.shape[1:]

    def active(self, step: int, steps: int) -> bool:
        """Whether step 0..steps-1 (0 is the noisiest) lies in the window."""
        start, end = self.config.window
        return start * steps <= step + 1e-9 < end * steps

    def __call__(
        self,
        x: Tensor,
        t: int | Tensor,
        class_labels: Tensor,
        *,
        alpha_bar: float | None = None,
        output_rms: Tensor | float = 1.0,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Corrected latents.

        Args:
            x: z_t, or x0_hat, as `config.target` says; (B, ...).
            t: timestep; only seeds the noise of the `q_sample` target.
            class_labels: (B,).
            alpha_bar: of t; needed for the `q_sample` target and the gradient form.
            output_rms: root mean square of the denoiser's output, a number or (B,).
            memory: finished latents and their labels; the last `config.memory` of each class join
                its problem.
        """
        move = self.direction(x, t, class_labels, alpha_bar=alpha_bar, memory=memory)
        return x - self.step(move, alpha_bar=alpha_bar, output_rms=output_rms)

    def direction(
        self,
        x: Tensor,
        t: int | Tensor,
        class_labels: Tensor,
        *,
        alpha_bar: float | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What lowers the transport cost when subtracted: x - T(x), or the gradient g."""
        _check(x, class_labels, "x")
        if self._reference is None:
            raise RuntimeError("OTGuidance has no reference yet: call set_reference first")
        if x.shape[1:] != self._shape:
            raise ValueError(
                f"x has latents of {tuple(x.shape[1:])}, the reference has {tuple(self._shape)}"
            )
        present, groups = _groups(class_labels)
        missing = sorted(set(present) - set(self._classes))
        if missing:
            raise ValueError(f"classes {missing} have no reference latents; give them all")
        rows = x.detach().flatten(1).float()
        if memory is not None and len(memory[0]):
            past = self._recent(memory, present)
            rows = torch.cat([rows, past[0]])
            groups = torch.cat([groups, past[1]])
        sources = _pad(rows, groups, len(present))
        index = torch.tensor([self._classes.index(k) for k in present], device=x.device)
        y, b = self._reference.rows[index].to(x.device), self._reference.weights[index].to(x.device)
        if self.config.target == "q_sample":
            y = self._noised(y, present, int(t), alpha_bar)
        move = self._solve(sources, y, b)
        return move.flatten(0, 1)[sources.slots[: len(x)]].view_as(x).to(x.dtype)

    def step(
        self, move: Tensor, *, alpha_bar: float | None = None, output_rms: Tensor | float = 1.0
    ) -> Tensor:
        """Scales a direction to the step that is subtracted from the latents."""
        if self.config.form == "projection":
            return self.config.strength * move
        if alpha_bar is None:
            raise ValueError("alpha_bar is needed by the gradient form of the guidance")
        shape = (-1,) + (1,) * (move.ndim - 1)
        rms = move.flatten(1).square().mean(1).sqrt().clamp_min(1e-12).view(shape)
        output = torch.as_tensor(output_rms, dtype=move.dtype, device=move.device)
        rho = RHO * output.expand(len(move)).view(shape) * (1 - alpha_bar) ** 0.5 / rms
        return self.config.strength * rho * move

    def transport_cost(self, x: Tensor, class_labels: Tensor) -> Tensor:
        """Cost <P, C> of each class present, in the order of their labels; (K,)."""
        present, groups = _groups(class_labels)
        sources = _pad(x.detach().flatten(1).float(), groups, len(present))
        index = [self._classes.index(k) for k in present]
        y, b = self._reference.rows[index], self._reference.weights[index]
        C = cost_matrix(sources.rows, y, self.config.metric)
        eps = self._eps(C, sources.weights, b)
        return sinkhorn(C, sources.weights, b, eps=eps, max_iter=self.config.max_iter).cost

    def _solve(self, sources: _Padded, y: Tensor, b: Tensor) -> Tensor:
        x, kappa = sources.rows, self.config.repulsion if len(y) > 1 else 0.0
        gradient = self.config.form == "gradient"
        with torch.set_grad_enabled(gradient):
            x = x.detach().requires_grad_(gradient)
            C = cost_matrix(x, y, self.config.metric)
            eps = self._eps(C.detach(), sources.weights, b)
            result = sinkhorn(
                C.detach(), sources.weights, b, eps=eps, max_iter=self.config.max_iter
            )
            if not gradient:
                image = barycentric(result, y)
                if kappa:
                    others, near = self._others(image, y, b, eps / self.config.lambda_1)
                    image = image + kappa * (image - near @ others)
                return x - image
            objective = (result.plan * C).sum()
            if kappa:
                others, near = self._others(x.detach(), y, b, eps / self.config.lambda_1)
                away = near * cost_matrix(x, others, self.config.metric)
                objective = objective - kappa * (sources.weights[..., None] * away).sum()
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

    def _recent(self, memory: tuple[Tensor, Tensor], present: list[int]) -> tuple[Tensor, Tensor]:
        latents, labels = memory
        rows, groups = [], []
        for group, label in enumerate(present):
            own = latents[labels == label][-self.config.memory :]
            rows.append(own.flatten(1).float())
            groups.append(torch.full((len(own),), group, device=labels.device))
        return torch.cat(rows), torch.cat(groups)


def rng(*key: object) -> torch.Generator:
    """A generator that depends on the key alone, whatever ran before or elsewhere."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


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


def _groups(class_labels: Tensor) -> tuple[list[int], Tensor]:
    present, groups = class_labels.unique(return_inverse=True)
    return present.tolist(), groups


def _pad(rows: Tensor, groups: Tensor, count: int) -> _Padded:
    sizes = torch.bincount(groups, minlength=count)
    order = torch.argsort(groups, stable=True)
    rank = torch.arange(len(groups), device=rows.device)
    rank = rank - (sizes.cumsum(0) - sizes)[groups[order]]
    width = int(sizes.max())
    slots = torch.empty_like(order)
    slots[order] = groups[order] * width + rank
    # Padding repeats a real row, so that every cost (cosine too) stays finite there.
    first = order[(sizes.cumsum(0) - sizes)]
    index = first[:, None].expand(-1, width).reshape(-1).clone()
    index[slots] = torch.arange(len(groups), device=rows.device)
    weights = rows.new_zeros(count * width)
    weights[slots] = 1 / sizes[groups].to(rows.dtype)
    return _Padded(rows[index].view(count, width, -1), weights.view(count, width), slots)


def _check(latents: Tensor, class_labels: Tensor, name: str) -> None:
    if latents.ndim < 2 or len(latents) == 0 or not latents.is_floating_point():
        raise ValueError(
            f"{name} must be a floating tensor (B, ...) with B >= 1, got {latents.dtype} "
            f"{tuple(latents.shape)}"
        )
    if class_labels.shape != latents.shape[:1] or class_labels.dtype != torch.int64:
        raise ValueError(
            f"class_labels must be int64 of shape ({len(latents)},), got {class_labels.dtype} "
            f"{tuple(class_labels.shape)}"
        )
    if latents.device.type == "cpu" and not torch.isfinite(latents).all():
        raise ValueError(f"{name} contains NaN or infinity")
