"""Adapters of POT, geomloss with KeOps, and OTT-JAX; versions in constraints/tested.txt."""

from collections.abc import Callable

import torch
from cases import Case, Data
from contender import (
    MEMORY,
    Contender,
    Output,
    Run,
    by_autograd,
    by_plan,
    leaves_of,
    read_torch,
    refuse,
    refuse_graph,
)
from torch import Tensor

# POT ----------------------------------------------------------------------------------------------


def pot_result(C: Tensor, data: Data, iterations: int, method: str, grad: str):
    from ot.batch import solve_batch

    options = {"max_iter": iterations, "tol": 0.0, "method": method, "grad": grad}
    return solve_batch(C, data.eps, data.a, data.b, **options)


def pot_detached(method: str) -> Callable[[Case, Data, str, int], Run]:
    def solve(C: Tensor, data: Data, iterations: int) -> tuple[Tensor, Callable[[], Tensor]]:
        result = pot_result(C, data, iterations, method, "detach")
        return result.value, lambda: result.plan

    return by_plan(solve)


def pot_envelope(method: str) -> Callable[[Case, Data, str, int], Run]:
    def value(C: Tensor, data: Data, iterations: int) -> Tensor:
        return pot_result(C, data, iterations, method, "envelope").value

    build_any = by_autograd(value, kept=2)

    def build(case: Case, data: Data, direction: str, iterations: int) -> Run:
        refuse(direction == "forward", "forward is that of detach")
        return build_any(case, data, direction, iterations)

    return build


def pot_samples(case: Case, data: Data, direction: str, iterations: int) -> Run:
    from ot.batch import solve_sample_batch

    refuse(case.kind != "points", "takes two clouds of points")
    differences = case.B * case.N * case.M * case.D * data.x.element_size()
    refuse(case.metric == "l1" and differences > MEMORY, "L1 makes (B, N, M, D) differences")
    leaf = leaves_of(case, data, direction)[0]
    options = {"max_iter": iterations, "tol": 0.0, "method": "log_sinkhorn"}
    options |= {"metric": "minkowski", "p": 1} if case.metric == "l1" else {"metric": "sqeuclidean"}
    options["grad"] = "detach" if direction == "forward" else "envelope"
    if direction != "forward":
        refuse_graph(case, data, 2 * iterations)

    def run() -> Output:
        value = solve_sample_batch(leaf, data.y, data.eps, data.a, data.b, **options).value
        gradients = [] if direction == "forward" else torch.autograd.grad(value.sum(), leaf)
        return value, list(gradients)

    return run


def read_pot(case: Case, data: Data, output: Output) -> tuple[Tensor, list[Tensor]]:
    """POT's value has the entropy of the plan where ours has KL(P | a x b)."""
    value, gradients = read_torch(case, data, output)
    if case.kind == "logits":
        return value, gradients
    entropies = [torch.special.entr(w.double()).sum(-1) for w in (data.a, data.b)]
    return value + data.eps * (entropies[0] + entropies[1]), gradients


# GeomLoss and KeOps -------------------------------------------------------------------------------


def geomloss_samples(case: Case, data: Data, direction: str, iterations: int, backend: str) -> Run:
    """SamplesLoss at one eps: a schedule of constant length needs a diameter just above the blur.

    Its cost is half the square, so eps is halved and the value doubled.
    """
    from geomloss import SamplesLoss

    refuse(case.kind in ("metric", "logits"), "returns the Sinkhorn value alone")
    refuse(case.kind == "row", "takes points, not rows of a cost")
    given, l1 = case.kind == "given", case.metric == "l1"
    online = backend == "online"
    refuse(online and (given or l1), "KeOps needs points and a formula; L1 is not in geomloss")
    refuse(online and case.D > 100, f"KeOps writes D = {case.D} into the code of its kernel")
    leaf = leaves_of(case, data, direction)[0]
    p, scale = (1, 1) if given or l1 else (2, 2)
    x, y = (leaf.new_zeros(case.B, n, 1) for n in (case.N, case.M)) if given else (leaf, data.y)
    cost, turns = None, iter(())
    if given:
        cost = lambda *_: next(turns)  # noqa: E731
    elif l1:
        cost = lambda x, y: torch.cdist(x, y, p=1)  # noqa: E731
    blur, steps = (data.eps / scale) ** (1 / p), max(iterations - 4, 1)
    loss = SamplesLoss(
        p=p, blur=blur, diameter=blur * 1.001, scaling=1.001 ** (-1 / steps), cost=cost,
        debias=False, backend=backend,
    )  # fmt: skip

    def run() -> Output:
        nonlocal turns
        turns = iter((leaf, leaf.mT.detach()))
        value = loss(data.a, x, data.b, y) * scale
        gradients = [] if direction == "forward" else torch.autograd.grad(value.sum(), leaf)
        return value, list(gradients)

    return run


def geomloss_tensorized(case: Case, data: Data, direction: str, iterations: int) -> Run:
    return geomloss_samples(case, data, direction, iterations, "tensorized")


def geomloss_online(case: Case, data: Data, direction: str, iterations: int) -> Run:
    return geomloss_samples(case, data, direction, iterations, "online")


def geomloss_batch(C: Tensor, data: Data, iterations: int) -> Tensor:
    from geomloss import ot

    return ot.solve_batch(C, a=data.a, b=data.b, reg=data.eps, max_iter=iterations).value


# OTT ----------------------------------------------------------------------------------------------


def ott_run(case: Case, data: Data, direction: str, iterations: int) -> Run:
    """Jitted, `vmap` over the batch. OTT starts with the columns: it gets the transposed cost."""
    import jax

    refuse(case.kind in ("metric", "logits"), "returns the Sinkhorn value alone")
    elsewhere = data.a.is_cuda and jax.default_backend() != "gpu"
    refuse(elsewhere, f"JAX has no GPU here, only {jax.default_backend()}")
    differences = case.B * case.N * case.M * case.D * data.a.element_size()
    too_large = case.metric == "l1" and direction != "forward" and differences > MEMORY
    refuse(too_large, "the gradient of its L1 cost makes (B, N, M, D) differences")
    jax.config.update("jax_enable_x64", data.a.dtype == torch.float64)
    given = case.kind == "given"
    arrays = (data.C, data.y, data.C) if given else (data.x, data.y, data.C)
    tensors = (*arrays, data.a, data.b)
    x, y, C, a, b = (None if t is None else jax.numpy.asarray(t.cpu().numpy()) for t in tensors)

    def value_of(x, y, C, a, b):
        return jax.vmap(lambda *p: ott_value(case, data.eps, iterations, *p))(x, y, C, a, b)

    def total(*args):
        value = value_of(*args)
        return value.sum(), value

    function = value_of if direction == "forward" else jax.value_and_grad(total, has_aux=True)
    function = jax.jit(function)

    def run() -> Output:
        output = jax.block_until_ready(function(x, y, C, a, b))
        return (output, []) if direction == "forward" else (output[0][1], [output[1]])

    return run


def ott_value(case: Case, eps: float, iterations: int, x, y, C, a, b):
    import jax.numpy as jnp
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    if case.kind == "given":
        transposed = x.T
    elif case.metric == "l1":
        transposed = jnp.abs(y[:, None] - x[None]).sum(-1)
    else:
        transposed = (y**2).sum(-1)[:, None] + (x**2).sum(-1)[None] - 2 * y @ x.T
    if case.kind == "row":
        transposed = jnp.concatenate([C.T, transposed], 1)
    fixed = {"min_iterations": iterations, "max_iterations": iterations}
    solver = Sinkhorn(threshold=-1.0, inner_iterations=iterations, use_danskin=True, **fixed)
    problem = LinearProblem(Geometry(cost_matrix=transposed, epsilon=eps), b, a)
    return solver(problem).reg_ot_cost


def read_jax(case: Case, data: Data, output: Output) -> tuple[Tensor, list[Tensor]]:
    import numpy as np

    value, gradients = output
    as_torch = lambda t: torch.from_numpy(np.array(t, dtype=np.float64))  # noqa: E731
    return as_torch(value), [as_torch(g) for g in gradients]


def pot(name: str, build: Callable[[Case, Data, str, int], Run], safe: bool = True) -> Contender:
    return Contender(name, "ot", build, read_pot, safe=safe, primal=True)


LIBRARIES = [
    pot("POT log, detach", pot_detached("log_sinkhorn")),
    pot("POT log, envelope", pot_envelope("log_sinkhorn")),
    pot("POT exp, detach", pot_detached("sinkhorn"), safe=False),
    pot("POT exp, envelope", pot_envelope("sinkhorn"), safe=False),
    pot("POT solve_sample_batch", pot_samples),
    Contender(
        "geomloss SamplesLoss", "geomloss", geomloss_tensorized, read_torch, same_iterates=False
    ),
    Contender("geomloss KeOps", "pykeops", geomloss_online, read_torch, same_iterates=False),
    Contender(
        "geomloss.ot.solve_batch",
        "geomloss",
        by_autograd(geomloss_batch),
        read_torch,
        same_iterates=False,
    ),
    Contender("OTT-JAX", "ott", ott_run, read_jax, compiles=True),
]
