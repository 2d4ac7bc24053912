"""Faster ways to Sinkhorn's fixed point: epsilon scaling, and Anderson acceleration with a guard.

Both only choose where a plain iteration starts, so that every result is that of a plain iteration.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

LEVEL_ERROR = 1e-2  # marginal error, over the mass, at which a level of a schedule ends,
LEVEL_ITERATIONS = 100  # or after so many iterations
_MEMORY, _PERIOD = 6, 3


def cost_range(C: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Range of the costs between points of weight > 0, ``(...)`` in float64."""
    used = (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2)
    highest = torch.where(used, C, -torch.inf).amax((-2, -1))
    return highest.double() - torch.where(used, C, torch.inf).amin((-2, -1)).double()


def levels(
    C: Tensor, a: Tensor, b: Tensor, eps: Tensor, ratio: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Levels of epsilon scaling above `eps`: the eps of each, and which problems have it.

    eps falls by `ratio` from the range of the costs (Schmitzer, SIAM J. Sci. Comput. 2019, section
    3.2).
    """
    level = cost_range(C, a, b)
    level = level.masked_fill(level.isinf(), torch.nan)  # it would never fall
    level = level.clamp(max=torch.finfo(C.dtype).max / 16)
    while bool((level > eps).any()):
        yield torch.maximum(level, eps), level > eps
        level = level * ratio


class Anderson:
    """Anderson acceleration of ``g -> T(g)``, each problem of a batch by itself.

    Every third iteration starts from the combination of the last iterates whose residuals
    ``T(g) - g``, combined alike, are smallest in the norm weighted by b (Anderson, J. ACM 1965;
    "type II" of Walker & Ni, SIAM J. Numer. Anal. 2011), the others where the one before ended
    (alternating: Pratapa, Suryanarayana & Pask, J. Comput. Phys. 2016).

    Plain iterations only gain dual value. One that starts from such a jump and loses some is taken
    back, and the jumps that follow are a quarter as long and half as frequent until one succeeds.
    """

    def __init__(self, g: Tensor, b: Tensor, limit: Tensor, free: Tensor) -> None:
        """Starts at `g`.

        Args:
            g: ``(..., M)``.
            b: Weights of the residual's entries; those of weight 0 take no part.
            limit: How far an entry may jump, ``(...)``.
            free: Whether ``T(g + constant) = T(g) + constant``, ``(...)``: then jumps have none.
        """
        self.b = b.double()
        self.x = torch.where(b > 0, g, 0).double()
        *batch, M = g.shape
        self.last, self.residual = torch.zeros_like(self.x), torch.zeros_like(self.x)
        self.moves = self.x.new_zeros(*batch, _MEMORY, M)
        self.changes = torch.zeros_like(self.moves)
        self.size, self.value = self.x.new_zeros(batch), self.x.new_zeros(batch)
        self.limit = self.most = limit
        self.free = free.unsqueeze(-1)
        self.jumped = torch.zeros_like(self.size, dtype=torch.bool)
        self.turn = torch.zeros_like(self.size)
        self.period = torch.full_like(self.size, _PERIOD)
        self.count = 0

    def step(
        self, g: Tensor, value: Tensor, slack: Tensor, tol: Tensor, may_jump: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Judges the iteration that ended at `g`, and says where the next one starts.

        Args:
            g: ``T(x)``, ``(..., M)``, of the start x given last, or the first one.
            value: Dual value at `g`, ``(...)``.
            slack: Rounding of `value`.
            tol: Residual, in the weighted L1 norm, from which on no jump is made.
            may_jump: Whether the next iteration may start elsewhere than at a result.

        Returns:
            Whether `g` is taken, whether the next iteration starts from a jump, and that start.
        """
        back = self.jumped & ~(value >= self.value - slack)
        after = self.jumped & ~back
        grown = torch.minimum(4 * self.limit, self.most)
        self.limit = torch.where(back, self.size / 4, torch.where(after, grown, self.limit))
        self.period = torch.where(back, 2 * self.period, torch.where(after, _PERIOD, self.period))
        self.turn = torch.where(back, 0, self.turn + 1)
        self._remember(torch.where(self.b > 0, g, 0).double(), back.unsqueeze(-1))
        wanted = ~back & (self.turn >= self.period)
        wanted &= (self.b * self.residual.abs()).sum(-1) > tol
        self.x, self.jumped = self.last, torch.zeros_like(back)
        if may_jump and bool(wanted.any()):
            self._jump(wanted, value)
        return ~back, self.jumped, torch.where(self.b > 0, self.x, g).to(g.dtype)

    def _remember(self, g: Tensor, back: Tensor) -> None:
        residual = g - self.x
        if self.count > 0:
            slot = self.count % _MEMORY
            self.moves[..., slot, :] = g - self.last
            self.changes[..., slot, :] = residual - self.residual
        self.count += 1
        self.moves = torch.where(back.unsqueeze(-1), 0, self.moves)
        self.changes = torch.where(back.unsqueeze(-1), 0, self.changes)
        self.last = torch.where(back, self.last, g)
        self.residual = torch.where(back, self.residual, residual)

    def _jump(self, wanted: Tensor, value: Tensor) -> None:
        """``x = last - theta moves`` with ``theta = argmin |residual - theta changes|``.

        The normal equations have a unit diagonal; 1e-10 more keeps them definite.
        """
        weighted = self.changes * self.b.unsqueeze(-2)
        gram, rhs = weighted @ self.changes.mT, weighted @ self.residual.unsqueeze(-1)
        square = gram.diagonal(dim1=-2, dim2=-1)
        scale = torch.where(square > 0, square.rsqrt(), 0).unsqueeze(-1)
        gram = gram * scale * scale.mT + 1e-10 * torch.eye(_MEMORY, dtype=gram.dtype).to(gram)
        theta = scale * torch.linalg.solve_ex(gram, scale * rhs).result
        step = -(theta * self.moves).sum(-2)
        mean = (self.b * step).sum(-1, keepdim=True) / self.b.sum(-1, keepdim=True)
        step = torch.where(self.b > 0, step - torch.where(self.free, mean, 0), 0)
        size = step.abs().amax(-1)
        self.jumped = wanted & (size > 0) & torch.isfinite(size)
        length = torch.where(self.jumped, torch.clamp(self.limit / size, max=1), 0)
        self.x = torch.where(
            self.jumped.unsqueeze(-1), self.last + length.unsqueeze(-1) * step, self.last
        )
        self.size = torch.where(self.jumped, length * size, self.size)
        self.value = torch.where(self.jumped, value.double(), self.value)
        self.turn = torch.where(self.jumped, 0, self.turn)
