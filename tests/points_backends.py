"""`sinkhorn_points` on every backend, and in every way that it gets its costs there."""

from otdd.ops import pointers
from otdd.ops.points import cpu, implicit, tiles

WAYS = ("reference", "cpu stored", "cpu streamed", "cuda", "triton")
MORE_OF_TRITON = ("triton stored", "triton panels", "triton resident")
OF_THE_FIXED_POINT = ("reference kept", "reference", "cpu kept", "cpu streamed")


def points_backend(way: str, monkeypatch) -> str:
    """Sets up a way, ``backend`` or ``backend WAY``; returns the backend.

    ``kept`` is the plan for the linear system of the fixed point.
    """
    backend, _, how = way.partition(" ")
    monkeypatch.setattr(implicit, "KEPT", 1 << 20 if how == "kept" else 0)
    if backend == "cpu":
        monkeypatch.setattr(cpu, "STORED", 0 if how == "streamed" else 1 << 20)
    elif backend == "triton":
        module = pointers.triton_kernels("points")
        monkeypatch.setattr(module, "_processors", lambda device: 8)  # so that columns are cut
        monkeypatch.setattr(tiles, "RESIDENT", 1 << 16 if how == "resident" else 0)
        if how in ("stored", "panels"):
            monkeypatch.setattr(tiles, "REMADE", dict.fromkeys(tiles.REMADE, 0))
            monkeypatch.setattr(tiles, "BY_DIFFERENCES", 2 if how == "stored" else 0)
        if how == "panels":
            monkeypatch.setattr(tiles, "STORED", 0)
            monkeypatch.setattr(tiles, "PANEL", 1 << 13)
    return backend


def iterations(metric: str, size: tuple) -> int:
    """So many that `clouds` of this size have converged to 1e-8 at eps 0.8, with any penalties."""
    return 300 if metric == "sqeuclidean" and min(size[:2]) > 1 else 80
