"""Surrogates of influence guidance (`otdd fit-surrogate`): one network, kept over its training.

What the guidance is known to use is four checkpoints of a ConvNet-6; how that is trained is not, so
optimiser, augmentation, length and the even spacing of the checkpoints are ours. Batches come from
(seed, epoch, step), and the state is kept after every epoch: an interrupted training ends with the
same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from otdd.distill import students
from otdd.distill.augment import augmentation
from otdd.distill.config import ConfigError, RelabelConfig
from otdd.distill.data import ImageData
from otdd.distill.match import accuracy, reproducible
from otdd.distill.relabel import Plan
from otdd.distill.store import Store
from otdd.distill.surrogate_config import SurrogateConfig
from otdd.distill.training import device_of

__all__ = ["SurrogateConfig", "fit_surrogate", "load_surrogates", "surrogate_digest"]

Progress = Callable[[str, int, int], None]

STATE = "state.safetensors"
SUMMARY = "surrogate.json"


def fit_surrogate(
    data: ImageData,
    config: SurrogateConfig | None = None,
    out: str | os.PathLike[str] = "surrogate",
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains the surrogate and writes its checkpoints into a folder; continues where it stopped.

    Args:
        data: training images; the test images give the accuracies.
        config: the network and its training.
        out: folder of the checkpoints.
        device: where the network is trained.
        progress: called as progress("fit-surrogate", epoch, epochs).

    Returns:
        What `surrogate.json` holds: architecture, classes, epochs and accuracies of checkpoints.
    """
    config = config or SurrogateConfig()
    students.check_network(config.arch, data)
    with Store.open(out, identity(data, config), lock=True) as store:
        names = [_name(number) for number in range(config.checkpoints)]
        if not all(map(store.has, [SUMMARY, *names])):
            with reproducible(data.image_shape):
                _train(store, data, config, torch.device(device), progress or (lambda *_: None))
        store.remove(STATE)
        return dict(store.read_json(SUMMARY))


def identity(data: ImageData, config: SurrogateConfig) -> dict[str, Any]:
    """What the content of a folder depends on."""
    return {"surrogate": dataclasses.asdict(config), "data_sha256": data.fingerprint}


def load_surrogates(folder: str | os.PathLike[str], data: ImageData) -> list[nn.Module]:
    """The checkpoints in a folder, frozen, in the order of the training.

    Raises:
        ConfigError: the folder holds no finished surrogate, or one of other classes or images.
    """
    store = Store(folder)
    key = "sample.influence.surrogate"
    if not store.has(SUMMARY):
        raise ConfigError(f"{key}: {folder} holds no finished surrogate; run `otdd fit-surrogate`")
    names = [path.name for path in store.path.glob("checkpoint-*.safetensors")]
    store.sums.verify([SUMMARY, *sorted(names)])
    about = store.read_json(SUMMARY)
    if about["classes"] != list(data.classes) or tuple(about["image_shape"]) != data.image_shape:
        raise ConfigError(
            f"{key}: {folder} was trained on {len(about['classes'])} classes of images of "
            f"{tuple(about['image_shape'])}; the data has {data.num_classes}, {data.image_shape}, "
            "or other names"
        )
    networks: list[torch.nn.Module] = []
    for number in range(len(about["checkpoints"])):
        network = students.make_network(about["arch"], data, seed=0)
        network.load_state_dict(store.read_tensors(_name(number)))
        networks.append(network.eval().requires_grad_(False))
    return networks


def surrogate_digest(folder: str | os.PathLike[str]) -> str:
    """SHA-256 over the checkpoints of a folder."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("checkpoint-*.safetensors")):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _train(
    store: Store,
    data: ImageData,
    config: SurrogateConfig,
    device: torch.device,
    progress: Progress,
) -> None:
    size = (data.image_shape[1], data.image_shape[2])
    batch = min(config.batch, len(data.train))
    drawn = augmentation(RelabelConfig(), data.name, size)
    plan = Plan(drawn, len(data.train), batch, size, config.epochs, config.seed)
    network = students.make_network(config.arch, data, config.seed).to(device)
    optimizer = torch.optim.AdamW(
        network.parameters(), config.lr, weight_decay=config.weight_decay, fused=True
    )
    first = _load(store, network, optimizer) if store.has(STATE) else 0
    for epoch in range(first, config.epochs):
        progress("fit-surrogate", epoch, config.epochs)
        _epoch(network, optimizer, plan, epoch, data, config)
        if epoch + 1 in config.marks():
            facts = {"epoch": epoch + 1, "accuracy": round(accuracy(network, data.test), 2)}
            name = _name(config.marks().index(epoch + 1))
            store.write_tensors(name, network.state_dict(), facts)
        if epoch + 1 < config.epochs:
            store.write_tensors(STATE, _state(network, optimizer), {"epochs": epoch + 1})
    kept = [store.read_meta(_name(n)) for n in range(config.checkpoints)]
    about = {"arch": config.arch, "classes": list(data.classes), "image_shape": data.image_shape}
    store.write_json(SUMMARY, {**about, "checkpoints": kept})
    progress("fit-surrogate", config.epochs, config.epochs)


def _epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    epoch: int,
    data: ImageData,
    config: SurrogateConfig,
) -> None:
    network.train()
    device = device_of(network)
    for step, batch in enumerate(plan.epoch(epoch)):
        done = (epoch * plan.steps_per_epoch + step) / plan.total
        for group in optimizer.param_groups:
            group["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * done))
        targets = batch.targets(data.train.labels, data.num_classes, plan.size).to(device)
        loss = F.cross_entropy(network(batch.apply(data.train.images, device)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not math.isfinite(value := loss.item()):
        raise ConfigError(
            f"lr: {config.lr} makes the training diverge: the loss is {value} in epoch "
            f"{epoch + 1}; expected a smaller one"
        )


def _name(number: int) -> str:
    return f"checkpoint-{number:02d}.safetensors"


def _state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value for name, value in slots.items()}
    return tensors


def _load(store: Store, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Takes over the state after some epochs; returns their number."""
    tensors, state = store.read_tensors(STATE), optimizer.state_dict()
    prefix = "network."
    network.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, index, slot = name.split(".")
            state["state"].setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict(state)
    return int(store.read_meta(STATE)["epochs"])
