"""Whether all problems of a batch have stopped, asked of the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


class Look:
    """A flag on its way to the host, behind all that was launched so far."""

    def __init__(self, flag: Tensor) -> None:
        self._seen = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._seen.copy_(flag, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(flag.device))

    def wait(self) -> None:
        self._event.synchronize()

    def arrived(self) -> bool:
        return self._event.query()

    def told(self) -> bool:
        return bool(self._seen)


class Watch:
    """Looks every so many iterations, one look at a time, while the host launches further ones.

    So the end is seen late, and iterations must leave problems that have stopped as they are. With
    `waits` no second look begins before the first has arrived: at most twice `every` iterations are
    launched in vain. On the CPU every iteration is looked at.

    Args:
        every: Iterations from one look to the next, at least.
        waits: For an earlier look, never for what was launched last. Else the host never waits.
    """

    def __init__(self, every: int, *, waits: bool) -> None:
        self._every, self._waits = every, waits
        self._look: Look | None = None
        self._due = 0

    def over(self, iteration: int, going: Tensor) -> bool:
        """Whether no problem was `going` when the last look that has arrived was made.

        `iteration` may leave some out.
        """
        if going.is_cpu:
            return not bool(going.any())
        if going.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        due = iteration >= self._due
        if due:
            self._due = iteration + self._every
        if self._look is not None:
            if due and self._waits:
                self._look.wait()
            if self._look.arrived():
                if not self._look.told():
                    return True
                self._look = None
        if due and self._look is None:
            self._look = Look(going.any())
        return False
