"""One process of a group: a step of a model under a gathered loss, its gradients into a file.

Usage: python gathered_run.py RANK WORLD FOLDER
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from otdd.losses import OTDistillationLoss

KINDS = ({}, {"beta_2": 0.5}, {"beta_2_share": 0.3}, {"beta_2": 1.0, "soft": "kl"})


def batch(rows=slice(None)):
    torch.manual_seed(0)
    made = torch.randn(8, 3), 3 * torch.randn(8, 5), torch.randint(0, 5, (8,))
    return [t[rows] for t in made]


def step(model, kind, rows=slice(None), **options):
    images, teacher, labels = batch(rows)
    model.zero_grad()
    loss, parts = OTDistillationLoss(**kind, **options)(model(images), teacher, labels, parts=True)
    loss.backward()
    return {"ot": parts["ot"], "beta_2": parts["beta_2"], "grad": model_grad(model)}


def model_grad(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def network():
    torch.manual_seed(1)
    return nn.Linear(3, 5)


def refusal(rank, rows):
    """What a gather says of batches of several sizes."""
    try:
        step(network(), {}, rows[: 3 + rank], gather=True)
    except ValueError as error:
        return str(error)
    return "no error"


def main(rank, world, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    rows = list(range(rank * 8 // world, (rank + 1) * 8 // world))
    model = DistributedDataParallel(network())
    made = {str(kind): step(model, kind, rows, gather=True) for kind in KINDS}
    made["refusal"] = refusal(rank, rows)
    torch.save(made, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
