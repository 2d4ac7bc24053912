"""What this machine can do at best: rates measured now, at this process's number of threads."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from cases import Work

FAR = 1 << 27  # bytes that fit no cache
NEAR = 1 << 24  # bytes that fit the last cache
DEGREE = {torch.float32: 6, torch.float64: 11}  # of 2^x on [-1/2, 1/2]


def core_cache() -> int:
    """Bytes of a core's second-level cache; 1 MiB where Linux does not say."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    return 1024 * int(size.read_text().strip().removesuffix("K")) if size.exists() else 1 << 20


def best(function: Callable, amount: float, seconds: float) -> float:
    """The highest rate, amount per second, seen in `seconds` of calls."""
    function()
    shortest, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        function()
        shortest = min(shortest, time.perf_counter() - start)
    return amount / shortest


def rates(dtype: torch.dtype, seconds: float = 0.3) -> dict[str, float]:
    """Copy bandwidth (read + written), matrix product, multiply-add and exp rates, per second.

    The rate of exps is that of `torch.exp`, or of the multiply-adds of the shortest polynomial that
    is good to the last digit, if that is higher.
    """
    found = {}
    for name, size in (("copy_near", NEAR), ("copy_far", FAR)):
        source = torch.rand(size // 2 // dtype.itemsize, dtype=dtype)
        target = torch.empty_like(source)
        found[name] = best(lambda t=target, s=source: t.copy_(s), size, seconds)
    n = 768
    p, q = torch.rand(n, n, dtype=dtype), torch.rand(n, n, dtype=dtype)
    out = torch.empty_like(p)
    found["gemm"] = best(lambda: torch.mm(p, q, out=out), 2 * n**3, seconds)
    found["fma"] = found["gemm"] / 2
    x = torch.rand(1 << 17, dtype=dtype)
    y = torch.empty_like(x)
    library = best(lambda: torch.exp(x, out=y), x.numel(), seconds)
    found["exp"] = max(library, found["fma"] / DEGREE[dtype])
    return found


def floor_ms(work: Work, rate: dict[str, float]) -> float:
    """Memory and arithmetic overlap; products, multiply-adds and exps share the same units."""
    copy = rate["copy_near"] if work.footprint <= 2 * NEAR else rate["copy_far"]
    arithmetic = work.gemm / rate["gemm"] + work.fmas / rate["fma"] + work.exps / rate["exp"]
    return 1e3 * max(work.bytes / copy, arithmetic)


def highest(*rates: dict[str, float]) -> dict[str, float]:
    """Of several measurements of the same rates: a busy machine only lowers them."""
    return {name: max(rate[name] for rate in rates) for name in rates[0]}


def put(row: dict) -> None:
    """Into a row of results its floor, and the share of it that otdd reaches."""
    row["floor_ms"] = floor_ms(Work(**row["work"]), row["rates"])
    ours = row["contenders"]["otdd"].get("median_ms")
    row["of_floor"] = ours and row["floor_ms"] / ours
