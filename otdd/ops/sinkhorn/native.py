"""The `cpu` backend of `sinkhorn`: C++ over raw pointers."""

from torch import Tensor



def refusal(C: Tensor) -> str | None:
    """Why the native CPU code cannot take `C`, or None."""
    if C.device.type != "cpu":
        return f"C is on {C.device}, not on the CPU"
    return None
def sinkhorn_cpu(*args): raise RuntimeError
def plan_cpu(*args): raise RuntimeError
def sinkhorn_backward_cpu(*args): raise RuntimeError
