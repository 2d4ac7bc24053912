"""What the products of `sinkhorn_points` may cost in accuracy: `precision=` on the Triton backend.

    python benchmarks/precision.py [--write benchmarks/results/precision.json]

The matrix units are emulated on the CPU: operands lose the bits that TF32 and bfloat16 don't have,
products are summed in float32. Costs made so, of clouds centred as the backend centres them, go
through a float64 solve; the error is that of its plan, ``sum |P - P_exact|`` of a mass of 1.
"""

import argparse
import json
from pathlib import Path

import gpu_report
import torch
from torch import Tensor

from otdd.ops import sinkhorn
from otdd.ops.points.tiles import tf32

CASES = [(2048, 2048, 64), (50, 1300, 4096)]
EPS = (0.1, 0.02, 0.005)  # of the median cost
ITERATIONS = 50


def cut(t: Tensor) -> Tensor:
    """The upper 19 bits: what the units read of a float32 number."""
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def bf16(t: Tensor) -> Tensor:
    return t.bfloat16().float()


def highest(x: Tensor, y: Tensor) -> Tensor:
    """Three products of TF32: of the upper halves, and of each with the other's lower half."""
    big_x, big_y = cut(x), cut(y)
    small = cut(x - big_x) @ big_y.mT + big_x @ cut(y - big_y).mT
    return small + big_x @ big_y.mT


PRODUCTS = {
    "highest": highest,
    "high": lambda x, y: tf32(x) @ tf32(y).mT,
    "high, bits cut off": lambda x, y: cut(x) @ cut(y).mT,
    "medium": lambda x, y: bf16(x) @ bf16(y).mT,
}


def squared(x: Tensor, y: Tensor, product: Tensor) -> Tensor:
    norms = (t.norm(dim=-1).square() for t in (x, y))
    own_x, own_y = norms
    return (own_x[:, None] + own_y[None] - 2 * product).clamp(min=0)


def errors(N: int, M: int, D: int, offset: float) -> list[dict]:
    """Rows of one pair of Gaussian clouds, `offset` standard deviations from the origin."""
    generator = torch.Generator().manual_seed(N + D)
    x, y = (torch.randn(n, D, generator=generator) + offset for n in (N, M))
    exact = torch.cdist(x.double(), y.double()).square()
    centre = (x.mean(0) + y.mean(0)) / 2
    u, v = x - centre, y - centre
    costs = {name: squared(u, v, product(u, v)) for name, product in PRODUCTS.items()}
    costs["highest, not centred"] = squared(x, y, highest(x, y))
    rows = []
    for share in EPS:
        options = {"eps": share * exact.median().item(), "max_iter": ITERATIONS}
        plan = sinkhorn(exact, **options).plan
        for name, C in costs.items():
            error = (sinkhorn(C.double(), **options).plan - plan).abs().sum().item()
            case = {"N": N, "M": M, "D": D, "offset": offset, "eps": share}
            rows.append({**case, "precision": name, "plan_error": float(f"{error:.3g}")})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path)
    path = parser.parse_args().write
    rows = [row for case in CASES for offset in (0.0, 5.0) for row in errors(*case, offset)]
    for row in rows:
        print(json.dumps(row))
    if path is not None:
        told = {"what": __doc__.split("\n\n")[2].strip(), "iterations": ITERATIONS}
        told |= {**gpu_report.stamp(), "torch": torch.__version__, "rows": rows}
        path.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
