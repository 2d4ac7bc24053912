"""Optimal-transport guidance of a diffusion sampler.

`OTGuidance` is a plain object for any sampling loop: give it real latents with `set_reference`,
then call it on x0_hat or z_t. For every class it solves one entropic transport problem between
the latents in flight (with those finished before) and the real ones,

    P = sinkhorn(C(z_n, x_j), eps = lambda_1 * std(C)),

and moves each latent by one of two forms. With T(z_n) = sum_j P_nj x_j / a_n, where a_n is the
weight of z_n, to which row n of P sums within some per cent after the iterations of the default,

    projection:  z <- z + strength * (T(z) - z)
    gradient:    z <- z - strength * rho_t * g,   g_n = sum_j P_nj grad_z c(z_n, x_j), P held fixed,
                 rho_t = 0.0015 * rms(model output) * sqrt(1 - alpha_bar_t) / rms(g)

(for the L1 cost g_n = sum_j P_nj sign(z_n - x_j); rho_t is that of influence-guided diffusion).
With `repulsion` = kappa > 0 the real latents R of the other classes in the call push away: the
projection is T + kappa * (T - R(T)), where R(z) = sum_j softmax_j(-c(z, x_j) / std(C)) x_j over
them, and the gradient form subtracts kappa times the gradient of the cost weighted by that softmax.
With `detail` > 0 a mean brings neither its blur nor its lack of contrast: `otdd.distill.detail`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from otdd.distill.config import GuidanceConfig
from otdd.distill.detail import Detail
from otdd.distill.terms import (
    Guidance,
    Memory,
    as_usual,
    check_latents,
    group_classes,
    rng,
    settings_of,
)
from otdd.ops import cost_matrix, sinkhorn
from otdd.ops.moves import scaled_eps, transport_moves


@dataclass(frozen=True, eq=False)
class _Padding:
    """Where rows go in a tensor by class, (K, N, ...), and what they weigh there.

    Attributes:
        index: Of the row at each place, (K * N).
        weights: (K, N), with zeros at the padding.
        slots: Place of each row among the K * N.
    """

    index: Tensor
    weights: Tensor
    slots: Tensor

    def of(self, latents: Tensor) -> Tensor:
        """Latents as rows of float32 by class, (K, N, D)."""
        rows = latents.detach().flatten(1)[self.index]
        return rows.float().view(*self.weights.shape, -1)


@dataclass(frozen=True, eq=False)
class _Flight:
    """What the classes of a batch in flight decide, once for all its denoising steps.

    Attributes:
        key: The labels and the device that this is for.
        present: Classes, in order.
        padding: Of the batch.
        real: Real latents (K, M, D).
        b: Their weights (K, M).
        barred: Which of all K * M are no others for a class: its own, and padding; (K, K * M).
        detail: What weighs the frequencies of moves, where something does.
    """

    key: tuple[object, ...]
    present: list[int]
    padding: _Padding
    real: Tensor
    b: Tensor
    barred: Tensor
    detail: Detail | None


@dataclass(frozen=True, eq=False)
class _Finished:
    """Costs (K, L, M) from the finished latents of a call, which stay where they are.

    They are made once for all the denoising steps of the same `memory` and flight, and so are the
    weights (K, N + L) that these and the latents in flight have in one problem.
    """

    key: tuple[object, ...]
    costs: Tensor
    weights: Tensor


def _same(key: tuple[object, ...], other: tuple[object, ...]) -> bool:
    """Whether both are of the very same tensors and values."""
    pairs = zip(key, other, strict=True)
    return all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in pairs)


def _version(t: Tensor) -> object:
    """Another one after each change in place; where PyTorch counts none, another at each call."""
    return object() if t.is_inference() else t._version


class OTGuidance(Guidance):
    """Guides latents of each class towards the distribution of its real latents.

    Args:
        config: target, form, cost and strength; the defaults are those that measured best.
        seed: of the choice of reference latents and of the noise of the `q_sample` target.
    """

    def __init__(self, config: GuidanceConfig | None = None, *, seed: int = 0) -> None:
        self.config = settings_of(config, GuidanceConfig())
        self.seed = seed
        self._classes: list[int] = []
        self._reference: tuple[Tensor, Tensor] | None = None
        self._flight: _Flight | None = None
        self._finished: _Finished | None = None

    @as_usual
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
        padding = _padding(groups, len(self._classes))
        self._reference = padding.of(latents), padding.weights
        self._flight = self._finished = None
        self._shape = tuple(latents.shape[1:])

    @property
    def normalised(self) -> bool:
        """Steps of the gradient form are scaled by rho_t."""
        return self.config.form == "gradient"

    def check(self, class_labels: Tensor, shape: tuple[int, ...]) -> None:
        """Raises if there is no reference for latents of this shape and these classes."""
        self._check_shape(shape)
        missing = sorted(set(class_labels.tolist()) - set(self._classes))
        if missing:
            raise ValueError(f"classes {missing} have no reference latents; give them all")

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if self._reference is None:
            raise RuntimeError("OTGuidance has no reference yet: call set_reference first")
        if tuple(shape) != tuple(self._shape):
            raise ValueError(f"x has latents of {tuple(shape)}, the reference has {self._shape}")

    @as_usual
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
        flight = self._in_flight(x, class_labels)
        y = flight.real
        if self.config.target == "q_sample":
            y = self._noised(y, flight.present, t, alpha_bar)
        finished = self._finish(memory, flight, y)
        move = self._move(flight, flight.padding.of(x), y, finished)
        return move.flatten(0, 1)[flight.padding.slots].view_as(x).to(x.dtype)

    @as_usual
    def transport_cost(self, x: Tensor, class_labels: Tensor) -> Tensor:
        """Cost <P, C> of each class present, in the order of their labels; (K,)."""
        check_latents(x, class_labels, "x")
        flight = self._in_flight(x, class_labels)
        a, b = flight.padding.weights, flight.b
        C = cost_matrix(flight.padding.of(x), flight.real, self.config.metric)
        eps = scaled_eps(C, a, b, self.config.lambda_1)
        return sinkhorn(C, a, b, eps=eps, max_iter=self.config.max_iter).cost

    def _in_flight(self, x: Tensor, class_labels: Tensor) -> _Flight:
        """Checked, and made where the labels are not those of the call before: values are read."""
        self._check_shape(tuple(x.shape[1:]))
        key = (class_labels, _version(class_labels), x.device)
        if self._flight is None or not _same(self._flight.key, key):
            self.check(class_labels, tuple(x.shape[1:]))
            present, groups = group_classes(class_labels)
            real, b = self._real(present, x.device)
            own = torch.eye(len(b), dtype=torch.bool, device=b.device).repeat_interleave(
                b.shape[1], 1
            )
            barred = own | (b.flatten() == 0)
            padding, detail = _padding(groups, len(present)), self._detail(real, b)
            self._flight = _Flight(key, present, padding, real, b, barred, detail)
        return self._flight

    def _real(self, present: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Real latents (K, M, D) of the classes present, and their weights (K, M)."""
        assert self._reference is not None  # `check` has seen to it
        rows, weights = self._reference
        if present != self._classes:  # else no copy: a run refers to just the classes in flight
            index = torch.tensor([self._classes.index(k) for k in present], device=rows.device)
            rows, weights = rows[index], weights[index]
        return rows.to(device), weights.to(device)

    def _move(self, flight: _Flight, x: Tensor, y: Tensor, finished: _Finished | None) -> Tensor:
        """`direction` by class, (K, N, D)."""
        config, a = self.config, flight.padding.weights
        sharing = a if finished is None else finished.weights
        gradient, kappa = config.form == "gradient", config.repulsion if len(y) > 1 else 0.0
        moves = transport_moves(
            x,
            y,
            sharing,
            flight.b,
            lambda_1=config.lambda_1,
            metric=config.metric,
            max_iter=config.max_iter,
            gradient=gradient,
            given=None if finished is None else finished.costs,
        )
        if not gradient:
            image = moves.of_x
            if kappa:
                others, near = self._others(flight, image, y, moves.eps)
                image = image + kappa * (image - near @ others)
            noised = config.target == "q_sample"  # and so are the frequencies, at every step anew
            detail = self._detail(y, flight.b) if noised else flight.detail
            return x - image if detail is None else detail.move(x, image, a, sharing)
        if kappa:
            others, near = self._others(flight, x, y, moves.eps)
            with torch.enable_grad():
                x = x.requires_grad_()
                away = near * cost_matrix(x, others, config.metric)
                mass = sharing[:, : x.shape[1], None]
                (push,) = torch.autograd.grad(kappa * (mass * away).sum(), x)
            return moves.of_x - push
        return moves.of_x

    def _detail(self, y: Tensor, b: Tensor) -> Detail | None:
        """Of references (K, M, D); None where moves are not weighed."""
        config = self.config
        if config.form == "gradient" or config.detail == 0 or len(self._shape) != 3:
            return None
        return Detail(y, b, self._shape, config.detail)

    def _others(self, flight: _Flight, x: Tensor, y: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Real latents of all classes (K * M, D), and how near those of others are (K, N, K * M).

        Nearness sums to 1: softmax_j(-C_nj / std(C)) over the latents of the other classes.
        """
        others, spread = y.flatten(0, 1), eps / self.config.lambda_1
        C = cost_matrix(x, others, self.config.metric)
        scores = (-C / spread[:, None, None]).masked_fill(flight.barred[:, None], -torch.inf)
        return others, scores.softmax(-1)

    def _noised(
        self, y: Tensor, present: list[int], t: int | Tensor, alpha_bar: float | None
    ) -> Tensor:
        if alpha_bar is None:
            raise ValueError("alpha_bar is needed by the target 'q_sample'")
        if isinstance(t, Tensor) and t.numel() != 1:
            seen = f"a tensor of {tuple(t.shape)}"
            raise ValueError(f"t: {seen} is not accepted; expected one timestep for all latents")
        t = int(t)
        noise = [
            torch.randn(
                y.shape[1:],
                generator=rng(self.seed, "q_sample", label, t),
                dtype=torch.float32,
                device="cpu",
            )
            for label in present
        ]
        return alpha_bar**0.5 * y + (1 - alpha_bar) ** 0.5 * torch.stack(noise).to(y.device)

    def _finish(self, memory: Memory | None, flight: _Flight, y: Tensor) -> _Finished | None:
        """Costs from the latents finished before to the real ones, if there are any."""
        if memory is None or len(memory[0]) == 0:
            return None
        noised = y if self.config.target == "q_sample" else None  # other targets at every step
        key = (*memory, *map(_version, memory), flight, noised)
        if self._finished is None or not _same(self._finished.key, key):
            latents, groups = self._recent(memory, flight.present)
            if len(latents) == 0:
                return None
            padding = _padding(groups, len(flight.present))
            costs = cost_matrix(padding.of(latents), y, self.config.metric)
            a = (torch.cat([flight.padding.weights, padding.weights], 1) > 0).to(costs.dtype)
            self._finished = _Finished(key, costs, a / a.sum(1, keepdim=True))
        return self._finished

    def _recent(self, memory: Memory, present: list[int]) -> tuple[Tensor, Tensor]:
        latents, labels = memory
        rows, groups = [], []
        for group, label in enumerate(present):
            own = latents[labels == label][-self.config.memory :]
            rows.append(own)
            groups.append(torch.full((len(own),), group, device=labels.device))
        return torch.cat(rows), torch.cat(groups)


def pick_reference(class_labels: Tensor, size: int, seed: int) -> Tensor:
    """Indices of at most `size` elements of each class, drawn without replacement, in order."""
    kept = []
    for label in class_labels.unique().tolist():
        own = (class_labels == label).nonzero()[:, 0]
        if len(own) > size:
            draw = torch.randperm(len(own), generator=rng(seed, "reference", label), device="cpu")
            own = own[draw[:size].sort().values.to(own.device)]
        kept.append(own)
    return torch.cat(kept)


def _padding(groups: Tensor, count: int) -> _Padding:
    sizes = torch.bincount(groups, minlength=count)
    order = torch.argsort(groups, stable=True)
    rank = torch.arange(len(groups), device=groups.device)
    rank = rank - (sizes.cumsum(0) - sizes)[groups[order]]
    width = int(sizes.max())
    slots = torch.empty_like(order)
    slots[order] = groups[order] * width + rank
    # Padding repeats a real row, so that every cost (cosine too) stays finite there.
    first = order[(sizes.cumsum(0) - sizes).clamp_max(len(order) - 1)]  # of none: any row
    index = first[:, None].expand(-1, width).reshape(-1).clone()
    index[slots] = torch.arange(len(groups), device=groups.device)
    weights = torch.zeros(count * width, dtype=torch.float32, device=groups.device)
    weights[slots] = 1 / sizes[groups].float()
    return _Padding(index, weights.view(count, width), slots)
