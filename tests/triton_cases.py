"""The Triton kernels compiled for a GPU that is not there: ``python tests/triton_cases.py sm_90``.

Prints, for each case, what a kernel needs of a chip, as JSON; words after the architecture choose
cases by their names. Must not run with TRITON_INTERPRET=1, under which kernels have no compiler.
For AMD's, such as ``gfx942``, torch is told to be a ROCm build before otdd is imported, so that
launches are those of one.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

LANES = {"gfx90a": 64, "gfx942": 64, "gfx950": 64, "gfx1100": 32, "gfx1201": 32}  # of AMD's warps
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel with the arguments of one launch, as the launch would specialise them.

    Attributes:
        name: Unique among all cases.
        kernel: The ``triton.jit`` function.
        arguments: By name: a torch dtype for a pointer, a number, None; constexprs too.
        warps: Of a program.
        products: Whether matrix instructions must do the work.
        options: Further ones of the launch, for the compiler.
    """

    name: str
    kernel: object
    arguments: Mapping[str, object]
    warps: int = 4
    products: bool = False
    options: Mapping[str, int] = dataclasses.field(default_factory=dict)


def cases() -> Iterable[Case]:
    """All of them. An op adds its own by one more function beside these."""
    yield from _sinkhorn_cases()
    yield from _cost_cases()
    yield from _points_cases()


def _sinkhorn_cases() -> Iterable[Case]:
    from otdd.ops import pointers
    from otdd.ops.sinkhorn import triton_backward, triton_solve

    module = pointers.triton_kernels("sinkhorn")
    sizes = {
        torch.float32: [(5, 7), (1, 1), (32, 32), (64, 64), (64, 128), (128, 64), (400, 500)],
        torch.float64: [(16, 16), (64, 32), (64, 64), (400, 500)],
    }
    for dtype, shapes in sizes.items():
        for N, M in shapes:
            resident, (rows, columns), warps = module.layout(N, M, dtype)
            name = f"{'float32' if dtype == torch.float32 else 'float64'} {N}x{M}"
            row = -(-M // 16) * 16
            solve = dict.fromkeys(("C", "a", "b", "g0", "f_out", "g_out"), dtype)
            solve |= dict.fromkeys(("value_out", "cost_out", "error_out", "scratch"), dtype)
            solve |= dict.fromkeys(("eps", "rho_a", "rho_b", "history"), torch.float64)
            solve |= {
                "n_iter_out": torch.int64,
                "n_iter": torch.int64,
                "N": N,
                "M": M,
                "SINKD": False,
            }
            solve |= {"C_b": N * row, "C_n": row, "a_b": N, "a_n": 1, "b_b": M, "b_m": 1}
            solve |= {"g_b": M, "g_m": 1, "eps_b": 1, "rho_a_b": 1, "rho_b_b": 1, "max_iter": 100}
            solve |= {"tol": 1e-3, "BLOCK_N": rows, "BLOCK_M": columns, "steps": 101}
            solve |= dict.fromkeys(("df", "dg", "dC", "da", "db"), dtype)
            kernel, options = triton_solve.solve_resident, {}
            if not resident:
                kernel, options = triton_solve.solve_streamed, module.REGISTERS
            yield Case(f"{kernel.__name__} {name}", kernel, solve, warps, options=options)
            if (N, M) in ((64, 64), (400, 500)):
                bare = solve | dict.fromkeys(("a", "b", "g0", "rho_a", "rho_b", "history"))
                yield Case(f"{kernel.__name__} {name} bare", kernel, bare, warps, options=options)
            if N * M >= 2048:
                kernel, options = triton_backward.backward_unrolled, module.MOST_REGISTERS
                yield Case(f"backward_unrolled {name}", kernel, solve, warps, options=options)
        plan = solve | dict.fromkeys(("f", "g", "scale", "P", "value_out"), dtype)
        plan |= {"f_b": N, "f_n": 1, "scale_b": 1, "BLOCK_N": 16, "BLOCK_M": 128, "BLOCK": 512}
        yield Case(f"plan {name}", triton_backward.plan, plan)
        yield Case(f"values {name}", triton_solve.values, plan)


def _cost_cases() -> Iterable[Case]:
    from otdd.ops import pointers

    kernels = pointers.triton_kernels("cost").kernels
    for dtype, size in ((torch.float32, 64), (torch.float64, 32)):
        sizes = {"N": 500, "M": 400, "D": 1000, "x_b": 500000, "y_b": 400000, "G_b": 200000}
        sizes |= {"x_n": 1000, "y_m": 1000, "G_n": 400, "G_m": 1, "CHUNK": 64}
        sizes |= dict.fromkeys(("x", "y", "C", "G", "dx"), dtype)
        sizes |= {"BLOCK_N": size, "BLOCK_M": size, "BLOCK_D": size}
        for kernel in (kernels.l1_cost, kernels.l1_side):
            yield Case(f"{kernel.__name__} {str(dtype)[6:]}", kernel, sizes, 8)


def _points_cases() -> Iterable[Case]:
    """What the host code launches, taken down in place of being run."""
    from otdd.ops import pointers
    from otdd.ops.points import tiles
    from otdd.ops.points.reference import Clouds

    module, launched = pointers.triton_kernels("points"), {}
    names = ("softmin_kernel", "merge_kernel", "decide_kernel", "tile_kernel")
    kernels = {name: _Recorder(getattr(module.kernels, name), launched) for name in names}
    for dtype in (torch.float32, torch.float64):
        for metric, D, precision, stored, labelled in (
            ("sqeuclidean", 32, "highest", 1 << 30, True),
            ("sqeuclidean", 64, "highest", 1 << 30, True),
            ("sqeuclidean", 64, "high", 1 << 30, False),
            ("sqeuclidean", 64, "medium", 1 << 30, False),
            ("l1", 8, "highest", 1 << 30, True),
            ("l2", 100, "highest", 1 << 30, False),
            ("l2", 100, "high", 0, False),
        ):
            label = torch.zeros(1, 128, dtype=torch.int64)
            labels = (label, label, torch.ones(1, 2, 2, dtype=dtype)) if labelled else (None,) * 3
            x, w = torch.zeros(1, 128, D, dtype=dtype), torch.ones(1, 128, dtype=dtype)
            eps = torch.ones(1, dtype=torch.float64)
            p = Clouds(x, x, w, w, eps, eps, eps, *labels)
            with (
                mock.patch.multiple(
                    module, kernels=SimpleNamespace(**kernels), _processors=lambda device: 132
                ),
                mock.patch.multiple(tiles, STORED=stored, RESIDENT=0),
            ):
                # A solve that stops by itself has all of one that does not, seen with one metric.
                for tol in (0.0, 1e-3) if metric == "l1" else (1e-3,):
                    module.points_triton(p, w, metric, 2, tol, precision)
                options = metric, "difference", metric == "l2", precision
                module.product_triton(p, w, w, w, w, eps, x, *options)
                if metric == "l1":  # of costs that are given
                    goal = torch.full((1,), 1e-3, dtype=torch.float64)
                    module.given_triton(x.new_zeros(1, 128, 128), w, w, eps, eps, eps, w, 2, goal)
    yield from launched.values()


class _Recorder:
    """Stands in for a kernel; puts down a case for each way that it would be compiled."""

    def __init__(self, kernel: object, launched: dict[str, Case]) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid: tuple) -> Callable[..., None]:
        def launch(*args: object, num_warps: int = 4, num_stages: int = 3, **kwargs: object):
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            given = {k: v.dtype if isinstance(v, torch.Tensor) else v for k, v in given.items()}
            constants = [given[p.name] for p in self.kernel.params if p.is_constexpr]
            dtype = str(given["out" if "out" in given else "f"])[6:]
            name = " ".join(map(str, (self.kernel.__name__, dtype, *constants)))
            products = given.get("COST") == "product" and dtype == "float32"
            stages = {"num_stages": num_stages}
            self.launched[name] = Case(name, self.kernel, given, num_warps, products, stages)

        return launch


def _source(case: Case, pointer: list[list]):
    """The kernel with types: a launch takes a 1 for a constant and sees what 16 divides."""
    from triton.compiler import ASTSource

    signature, constants, hints = {}, {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        value = case.arguments[name]
        constant = case.kernel.params[index].is_constexpr
        if constant or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.dtype):
            signature[name], hints[(index,)] = POINTERS[value], pointer
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                hints[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=hints)


def compiled(case: Case, arch: str) -> dict[str, object]:
    """Registers, bytes of stack and shared memory, matrix instructions and whether they must be.

    Of what Triton itself has made, with its own options. The stack holds what spills, as no kernel
    here has another use for it; Triton, too, counts spills by it (``n_spills``).
    """
    import triton
    from triton.backends.compiler import GPUTarget

    aligned, options = ["tt.divisibility", 16], {"num_warps": case.warps, **case.options}
    if arch in LANES:  # tensors of up to 2 GB are told apart
        source, target = (
            _source(case, [aligned, ["tt.pointer_range", 32]]),
            GPUTarget("hip", arch, LANES[arch]),
        )
        return _of_amd(case, arch, triton.compile(source, target=target, options=options))
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    kernel = triton.compile(_source(case, [aligned]), target=target, options=options)
    registers, stack = _usage(kernel.asm["cubin"])
    instructions = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)"
    return {
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "products": len(re.findall(instructions, kernel.asm["ptx"])),
        "matrix": case.products,
    }


def _of_amd(case: Case, arch: str, kernel: Any) -> dict[str, object]:
    """Of the assembly and what it says of itself.

    RDNA has no matrix instructions for float32. ``fences`` order memory as well: as many as the
    kernel has ``barriers`` of its own, at least.
    """
    text, halves = kernel.asm["amdgcn"], case.arguments.get("PRECISION") == "bf16"
    told = {
        name: int(re.search(rf"\.{name}: +(\d+)", text).group(1))
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    }
    return {
        "registers": told["vgpr_count"],
        "stack": told["private_segment_fixed_size"],
        "spills": told["vgpr_spill_count"],
        "shared": kernel.metadata.shared,
        "products": len(re.findall(r"\bv_(?:mfma|wmma)_", text)),
        "matrix": case.products and (LANES[arch] == 64 or halves),
        "fences": kernel.asm["llir"].count('fence syncscope("workgroup") release'),
        "barriers": case.kernel.src.count("tl.debug_barrier()"),
    }


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, by the tool that Triton brings along."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", told)
    return int(registers), int(stack)


def main(arch: str, *words: str) -> None:
    if arch in LANES:
        torch.version.hip = "of no device"
    found = {}
    for case in cases():
        if not words or any(word in case.name for word in words):
            found[case.name] = compiled(case, arch)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
