"""The processes of one run, as `torchrun` or `accelerate launch` start them.

Groups of classes are shared out; no tensor passes between processes, only what is to be made, and
that it is. All of them see the output folder, where every group is a file that appears when it is
complete. When one process is lost the others stop, and the same command, started again with any
number of processes, makes what is missing.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from otdd.distill.config import ConfigError

T = TypeVar("T")

JOIN = datetime.timedelta(minutes=10)
PATIENCE = datetime.timedelta(days=7)  # a group of large images may take hours


class WorkersError(RuntimeError):
    """Another process of the run was lost."""


@dataclass(frozen=True)
class Workers:
    """This process among all of a run; alone by default.

    Attributes:
        rank: its number.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Workers:
        """Joins the processes that the environment tells of (RANK, WORLD_SIZE, MASTER_ADDR).

        Raises:
            ConfigError: the environment tells of several, but not how to find them.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        _check_environment()
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        store, rank, size = next(rendezvous("env://", timeout=JOIN))
        dist.init_process_group(
            "gloo",
            store=dist.distributed_c10d.PrefixStore(_agree(store, rank, size), store),
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
        return cls(rank, size)

    @property
    def first(self) -> bool:
        """Whether this process does what only one may do."""
        return self.rank == 0

    def part(self, work: Sequence[T]) -> list[T]:
        """What this process is to make of some work."""
        return list(work[self.rank :: self.size])

    def share(self, value: Any) -> Any:
        """The value that the first process has; the others wait for it."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        try:
            dist.broadcast_object_list(box, src=0)
        except RuntimeError as error:
            raise _lost() from error
        return box[0]

    def wait(self) -> None:
        """Waits until every process has come here."""
        if self.size > 1:
            import torch.distributed as dist

            try:
                dist.barrier()
            except RuntimeError as error:
                raise _lost() from error

    def leave(self) -> None:
        """Ends the company of the others."""
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()


def _check_environment() -> None:
    """Raise a `ConfigError` for what a launcher would have set otherwise."""
    for key in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        seen = os.environ.get(key, "")
        number = key != "MASTER_ADDR"
        if not seen or (number and not seen.isdecimal()):
            accepted = "a number" if number else "a host"
            raise ConfigError(
                f"{key} of the environment: {seen!r} is not accepted; expected {accepted}, as "
                "torchrun sets it for each of several processes"
            )
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if rank >= size:
        raise ConfigError(
            f"RANK of the environment: {rank} is not accepted; expected 0 to {size - 1}, one less "
            "than WORLD_SIZE"
        )


def _agree(store: Any, rank: int, size: int) -> str:
    """A name that only the processes which are alive now share.

    A launcher that starts processes again may give them the store of those before them, and the
    addresses there are of the dead. So every process says hello by a word that is new, the first
    one answers each with the name, and ends when all have said it back.
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + JOIN.total_seconds()
    if rank > 0:
        store.set(f"hello/{rank}", mine)
        name = str(store.get(f"welcome/{mine}").decode())
        store.set(f"here/{name}/{rank}", "")
        return name
    away = set(range(1, size))
    while away:
        for other in sorted(away):
            if store.check([f"here/{mine}/{other}"]):
                away.discard(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", mine)
        if time.monotonic() > deadline:
            raise WorkersError(f"processes {sorted(away)} of this run have not come")
        time.sleep(0.02)
    return mine


def local_device(kind: str, key: str = "sample.device") -> str:
    """`cpu`, or the GPU of this process among those of its machine.

    Args:
        kind: `cpu` or `cuda`.
        key: the setting, for the error.

    Raises:
        ConfigError: there is no such GPU.
    """
    if kind == "cpu":
        return kind
    import torch

    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(
            f"{key}: 'cuda' is not accepted for process {number} of this machine; torch "
            f"sees {count} GPUs"
        )
    # cuBLAS repeats its results only so (read when its first handle is made).
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return f"cuda:{number}"


def _lost() -> WorkersError:
    return WorkersError(
        "another process of this run was lost; what is finished is kept, and the same command, "
        "with as many processes as there are, continues from there"
    )
