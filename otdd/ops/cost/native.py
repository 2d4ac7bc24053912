"""The `cpu` backend of `cost_matrix`: C++ tiles over raw pointers."""

from torch import Tensor



def refusal(x: Tensor) -> str | None:
    """Why the native CPU code cannot take `x`, or None."""
    if x.device.type != "cpu":
        return f"the inputs are on {x.device}, not on the CPU"
    return None


def cost_matrix_cpu(x: Tensor, y: Tensor, metric: str) -> Tensor:
    raise RuntimeError("not built")


def l1_backward_cpu(
    grad: Tensor, x: Tensor, y: Tensor, need_x: bool, need_y: bool
) -> tuple[Tensor, Tensor]:
    raise RuntimeError("not built")
