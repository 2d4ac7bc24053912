"""Numbers as a person reads them."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """A number of things: 1 set, 2 sets; the plural is given where it is not noun + s."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def averaged(mean: float, std: float, count: int, digits: int = 1) -> str:
    """A mean and, of more than one value, their deviation: 57.7 or 57.7 ± 0.3."""
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if count > 1 else "")


def sized(count: int) -> str:
    """A number of bytes in the unit that suits it: 12 KiB, 3.4 MiB."""
    power = min(max(count, 1).bit_length() - 1, 40) // 10
    size, unit = count / 1024**power, ("bytes", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{size:.1f} {unit}" if power and size < 10 else f"{size:.0f} {unit}"
