"""`backend="cuda"` and `backend="triton"` on the CPU: the kernels themselves, run by an emulator.

That of Triton is its own interpreter (see tests/conftest.py).
"""

import emulated
import interpreter
import pytest

from otdd import backends
from otdd.ops import pointers

SMALL = [(1, 1), (5, 7), (1, 9), (33, 50), (20, 300)]

# Triton's interpreter takes some milliseconds for an iteration: what it is spared, of tests that
# take many sizes, or thousands of iterations. By name of the test: whether it runs these arguments.
FEWER = {
    "test_cost": {"test_values": lambda p: p["sizes"] == (5, 7, 3) or p["batch"] == (1,)},
    "test_sinkhorn": {
        "test_values": lambda p: p["size"] in SMALL and p["max_iter"] != 2,
        "test_every_ratio_of_cost_to_eps": lambda p: (
            p["ratio"] in (10, 1e3, 1e5)
            and p["decades"] > 0
            and (p["dtype"].itemsize == 4 or p["kind"] == "points")
        ),
        "test_numbers_of_numpy_do_not_overflow": lambda p: False,
        "test_costs_of_wide_latents_do_not_overflow": lambda p: False,
        "test_gaussians_in_closed_form": lambda p: False,
        "test_properties": lambda p: False,
    },
    "test_sinkhorn_gradients": {
        "test_unrolled_is_exact_at_any_iteration": lambda p: (
            p["size"] in SMALL and len(p["names"]) == 5 and p["max_iter"] != 2
        ),
        "test_implicit_is_exact_at_convergence": lambda p: False,
        "test_envelope": lambda p: False,
        "test_gradients_of_one_large_problem": lambda p: False,
        "test_other_second_derivatives_are_refused_not_wrong": lambda p: p["grad"] == "envelope",
        "test_barycentric_of_potentials_and_masks": lambda p: False,
        "test_masks_have_no_gradient": lambda p: p["grad"] == "unrolled",
        "test_an_offset_of_the_costs_costs_no_digits": lambda p: p["grad"] == "unrolled",
        "test_implicit_where_the_plan_falls_into_blocks": lambda p: False,
        "test_second_derivatives_of_value_are_those_of_the_fixed_point": lambda p: (
            p["rho"] == (None, 0.3)
        ),
        "test_hessian_of_value_by_gradgradcheck": lambda p: False,
        "test_barycentric": lambda p: p["grad"] == "unrolled" and p["size"] in SMALL,
    },
    "test_unbalanced": {
        "test_values": lambda p: p["size"] in [(5, 7), (33, 50)],
        "test_a_problem_that_threads_share": lambda p: False,
        "test_every_ratio_of_cost_and_penalty_to_eps": lambda p: (
            p["ratio"] in (1, 1e5) and p["soft"] in (1e-3, 1e3) and p["dtype"].itemsize == 4
        ),
        "test_the_lightest_penalties_keep_their_digits": lambda p: p["rho"] in (1e-6, 1e-30),
        "test_the_value_is_the_primal_optimum": lambda p: p["rho"] == (0.4, 0.4),
        "test_zero_weights_are_masks": lambda p: p["padding"] < 0,
        "test_unrolled_is_autograd_through_the_loop": lambda p: (
            p["size"] == (5, 7) and p["dtype"].itemsize == 8
        ),
        "test_implicit_and_envelope_at_convergence": lambda p: False,
    },
    "test_logits": {
        "test_values_and_gradients": lambda p: p["size"] in [(1, 7), (7, 9)] and not p["sinkd"],
    },
    "test_moves": {
        "test_values": lambda p: p["size"] in [(1, 0, 9, 4), (5, 2, 7, 3)],
        "test_costs_of_any_size": lambda p: p["scale"] > 1,
    },
    "test_masses": {"test_total_weight": lambda p: p["mass"] in (1e-25, 1e25)},
    "test_transforms": {
        "test_hessian_of_value": lambda p: False,
        "test_gradients_of_each_problem_of_a_batch": lambda p: p["mode"] == "envelope",
    },
    "test_torch_integration": {
        "test_compile_fullgraph": lambda p: p["grad"] == "unrolled",
        "test_autocast_leaves_the_ops_in_float32": lambda p: p["metric"] == "l1",
    },
}


def pytest_collection_modifyitems(config, items):
    spared = [item for item in items if not _is_run(item)]
    if spared:
        config.hook.pytest_deselected(items=spared)
        items[:] = [item for item in items if item not in set(spared)]


def _is_run(item):
    case = getattr(item, "callspec", None)
    if not case or case.params.get("backend") != "triton":
        return True
    return FEWER.get(item.path.stem, {}).get(item.originalname, lambda p: True)(case.params)


@pytest.fixture
def emulated_cuda(monkeypatch):
    """The module of the emulated kernels, which stand in for those of the GPU."""
    module = emulated.module()
    monkeypatch.setattr(pointers, "emulated", module)
    monkeypatch.setitem(backends._REASONS, "cuda", None)
    module.set_chip(4, 227 << 10, 16)
    module.set_order(emulated.ORDERS["forward"])
    return module


@pytest.fixture(autouse=True)
def _emulated_where_asked_for(request):
    case = getattr(request.node, "callspec", None)
    asked = [case.params.get(name) for name in ("backend", "every", "way")] if case else []
    backends_asked = {value.split()[0] for value in asked if value}
    if "cuda" in backends_asked:
        request.getfixturevalue("emulated_cuda")
    if "triton" in backends_asked:
        reason = backends.available()["triton"]
        if reason is None and not backends.INTERPRETED:
            reason = "these tensors are on the CPU: set TRITON_INTERPRET=1"
        if reason is not None:
            pytest.skip(reason)
        if backends.INTERPRETED:
            interpreter.quicken()
