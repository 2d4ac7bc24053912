"""Triton's interpreter, spared what it does anew at every call and always with the same result."""

import functools
import inspect


@functools.cache
def quicken() -> None:
    """Remember which members of `triton.language` are patched, and the NumPy types of scalars.

    At each call of a kernel, and of each function inside it, the interpreter looks through some
    hundreds of members: a third of its time. What it patches, and with what, stays the same.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    if not all(
        hasattr(interpreter, f"_{x}") for x in ("patch_builtin", "patch_attr", "get_np_dtype")
    ):
        return  # another Triton's, which then takes longer

    @functools.cache
    def builtins_of(package: object) -> list[str]:
        members = inspect.getmembers(package)
        return [name for name, member in members if tl.core.is_builtin(member)]

    def patch_builtin(package, *rest):
        for name in builtins_of(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):  # not where a caller has patched it already
                interpreter._patch_attr(package, name, member, *rest)

    type_of_any = interpreter._get_np_dtype
    type_of_number = functools.cache(type_of_any)

    def type_of(dtype):
        scalar = dtype.scalar
        return type_of_any(scalar) if scalar.is_ptr() else type_of_number(scalar)

    interpreter._patch_builtin, interpreter._get_np_dtype = patch_builtin, type_of
