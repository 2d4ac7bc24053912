"""How an op's body becomes a citizen of PyTorch: traced, compiled, transformed, or just called.

The tensors of every op have the batch first, so that `torch.func.vmap` is one more batch dimension.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from otdd.ops import checks


def custom_op(name: str, body: Callable, fake: Callable) -> Callable:
    """Registers `body` as the custom op `name`, without a derivative; returns what to call.

    That is `body` itself on ordinary tensors, which saves the way through the dispatcher, and the
    op where something traces or transforms. Either way it runs outside autocast.
    """
    body = checks.outside_autocast(body)

    @functools.wraps(body)
    def registered(*args: object) -> Any:
        out = body(*args)
        if isinstance(out, Tensor) or all(t is not None for t in out):
            return out
        # A schema has a tensor where the body may have nothing.
        return tuple(made if t is None else t for t, made in zip(out, fake(*args), strict=True))

    definition = torch.library.custom_op(name, registered, mutates_args=())
    definition.register_fake(fake)
    namespace, short = name.split("::")
    op = getattr(getattr(torch.ops, namespace), short).default
    definition.register_vmap(_vmap_rule(op))

    @functools.wraps(body)
    def call(*args: object) -> Any:
        return body(*args) if _is_ordinary(args[0]) else op(*args)

    call.body = body
    return call


def differentiable(call: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """`call` with a derivative; the arguments are as for `torch.autograd.Function`."""

    def apply(*args: object) -> Any:
        return (Op if torch.compiler.is_compiling() else Eager).apply(*args)

    class Op(torch.autograd.Function):
        forward = staticmethod(call)
        vmap = staticmethod(_vmap_rule(apply))

    Op.setup_context = staticmethod(setup_context)
    Op.backward = staticmethod(_of_plain(backward))

    class Eager(Op):
        jvp = staticmethod(_no_forward_mode)  # Dynamo refuses to trace an Op with one

    body = getattr(call, "body", call)

    class Ordinary(Eager):
        forward = staticmethod(body)

    # What Function.apply does in the end; binding the arguments to a signature takes it as long.
    ordinary = super(torch.autograd.Function, Ordinary).apply

    def run(*args: object) -> Any:
        if not _is_ordinary(args[0]):
            return apply(*args)
        # A dual number wants a derivative too, whether it requires grad or not.
        dual = forward_ad._current_level >= 0
        return ordinary(*args) if dual or _wants_gradient(args) else body(*args)

    return run


def no_derivative(message: str) -> tuple[Callable, Callable]:
    """What `differentiable` needs of an op that has no derivative: it says so when asked."""

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise NotImplementedError(message)

    return setup_context, backward


def _no_forward_mode(ctx: Any, *tangents: Tensor | None) -> None:
    raise NotImplementedError(
        "otdd: forward-mode derivatives (jvp) are not implemented; those of reverse mode are: "
        "torch.func.vjp, jacrev and grad"
    )


def _of_plain(backward: Callable) -> Callable:
    """A backward whose gradients native code can read: what it cannot is resolved, or refused."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.compiler.is_compiling():
            return backward(ctx, *grads)
        return backward(ctx, *[None if grad is None else _plain(grad) for grad in grads])

    return run


def _plain(grad: Tensor) -> Tensor:
    if torch._C._functorch.is_legacy_batchedtensor(grad):
        raise NotImplementedError(
            "otdd: batched gradients of torch.autograd (is_grads_batched, vectorize=True) "
            "are not implemented; torch.func.vmap, jacrev and grad are"
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(grad).tangent is not None:
        _no_forward_mode(None)
    return checks.resolved(grad)


def _wants_gradient(args: tuple) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def _is_ordinary(t: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and not t.is_meta
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()  # torch.jit.trace records the ops, and nothing of a body
    )


def _vmap_rule(call: Callable) -> Callable:
    def rule(info: Any, in_dims: tuple, *args: object) -> tuple:
        moved = [
            _batch_first(t, dim, info.batch_size) for t, dim in zip(args, in_dims, strict=True)
        ]
        out = call(*moved)
        if isinstance(out, Tensor):
            return out, 0
        return out, tuple(0 if isinstance(t, Tensor) else None for t in out)

    return rule


def _batch_first(t: object, dim: int | None, size: int) -> object:
    if not isinstance(t, Tensor):
        return t
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
