"""What a notebook, or a loop of others, may have set around a call."""

import contextlib

import torch


@contextlib.contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": float64,
    "device": lambda: torch.device("meta"),  # in place of a GPU: what is made there cannot be read
}
