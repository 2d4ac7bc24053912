"""The guided update of a run: which terms its settings ask for, with their references.

    z_{t-1} = s(z_t, t, eps) - (influence) - (diversity) - (optimal transport),  or mode guidance.

A term of strength 0 is not made, so it costs nothing and needs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from otdd.distill.config import RunConfig, SampleConfig
from otdd.distill.data import ImageData
from otdd.distill.diversity import DiversityGuidance
from otdd.distill.evaluate import wants_soft
from otdd.distill.generator import Generator
from otdd.distill.guidance import OTGuidance, pick_reference
from otdd.distill.influence import InfluenceGuidance
from otdd.distill.latents import Latents
from otdd.distill.modes import ModeGuidance
from otdd.distill.relabel import Teacher, see
from otdd.distill.store import Store
from otdd.distill.surrogate import fit_surrogate, load_surrogates
from otdd.distill.surrogate_config import SurrogateConfig
from otdd.distill.terms import Guidance
from otdd.distill.workers import Workers

SURROGATE = "surrogate"


Judge = Callable[[Tensor, Tensor], Tensor]
"""Latents (B, c, h, w) and their labels (B,) to the transport cost of each class, (K,) in order."""


@dataclass(frozen=True)
class Update:
    """The terms for a group of classes; `judge` chooses among several starts, where there are."""

    terms: Sequence[Guidance]
    judge: Judge | None = None


class Updates:
    """Makes the terms of a run, group of classes by group.

    Args:
        data: real images.
        generator: its codec encodes them.
        config: `sample`, `ipc` and `seed` are used.
        latents: of the training images, if they are encoded already; as checked.
        surrogate: folder of the networks of influence guidance, if that is on.
        teachers: several starts are compared by their logits; without any, by latents.

    Raises:
        ConfigError: influence guidance is on and has no surrogate that fits the data.
    """

    def __init__(
        self,
        data: ImageData,
        generator: Generator,
        config: RunConfig,
        latents: Latents | None = None,
        surrogate: str | None = None,
        teachers: Sequence[Teacher] = (),
    ) -> None:
        self.data, self.generator, self.config, self.latents = data, generator, config, latents
        self.teachers = teachers
        self.surrogates = load_surrogates(surrogate, data) if surrogate is not None else []

    def of(self, group: range) -> Update:
        """Terms with the references of some classes; only images that they need are encoded."""
        settings, seed = self.config.sample, self.config.seed
        terms: list[Guidance] = []
        guided, judged = settings.guidance.strength > 0, wants_judge(settings)
        transport, judge = OTGuidance(settings.guidance, seed=seed), None
        if guided or (judged and not self.teachers):
            transport.set_reference(*self._latents(group, settings.guidance.reference_size))
        if settings.influence.strength > 0:
            terms.append(self._influence(group))
        if settings.diversity.strength > 0:
            terms.append(DiversityGuidance(settings.diversity))
        if guided:
            terms.append(transport)
        if settings.modes.strength > 0:
            terms.append(self._modes(group))
        if judged:
            judge = self._by_logits(group) if self.teachers else transport.transport_cost
        return Update(terms, judge)

    def _by_logits(self, group: range) -> Judge:
        """Transport of what the teachers see in the images: that tells blurred ones from real."""
        settings, train = self.config.sample.guidance, self.data.train
        transport = OTGuidance(settings, seed=self.config.seed)
        keep = self._indices(group, settings.reference_size)
        transport.set_reference(see(self.teachers, train.images[keep]), train.labels[keep])

        def judge(latents: Tensor, labels: Tensor) -> Tensor:
            logits = see(self.teachers, self.generator.codec.decode(latents))
            return transport.transport_cost(logits, labels.cpu()).to(latents.device)

        return judge

    def _influence(self, group: range) -> InfluenceGuidance:
        settings = self.config.sample.influence
        term = InfluenceGuidance(
            [network.to(self.generator.device) for network in self.surrogates],
            self.generator.codec.pixels,
            settings,
            seed=self.config.seed,
        )
        keep = self._indices(group, settings.reference_size)
        term.set_reference(self.data.train.images[keep], self.data.train.labels[keep])
        return term

    def _modes(self, group: range) -> ModeGuidance:
        ipc, seed = self.config.ipc, self.config.seed
        term = ModeGuidance(self.config.sample.modes, seed=seed)
        for label in group:
            kept = None if self.latents is None else self.latents.modes(label, ipc, seed)
            if kept is not None:
                term.set_modes(kept.to(self.generator.device), label)
            else:
                term.set_reference(*self._latents(range(label, label + 1), None), ipc)
        return term

    def _latents(self, group: range, size: int | None) -> tuple[Tensor, Tensor]:
        """Latents and labels of a group, all or at most `size` of each class."""
        keep, device = self._indices(group, size), self.generator.device
        if self.latents is not None:
            latents = self.latents.rows(keep)
        else:
            latents = self.generator.codec.encode(self.data.train.images[keep])
        return latents.to(device), self.data.train.labels[keep].to(device)

    def _indices(self, group: range, size: int | None) -> Tensor:
        labels = self.data.train.labels
        own = ((labels >= group.start) & (labels < group.stop)).nonzero()[:, 0]
        return own if size is None else own[pick_reference(labels[own], size, self.config.seed)]


def judged_by_teachers(config: RunConfig) -> bool:
    """Whether the teachers of a run compare several starts of its set otg."""
    settings = config.sample
    auto = settings.judge == "auto" and wants_soft(config) and config.latents is None
    return wants_judge(settings) and "otg" in config.sets and (auto or settings.judge == "teachers")


def wants_judge(settings: SampleConfig) -> bool:
    """Whether several joint samplings compete by their transport cost."""
    return settings.order == "joint" and settings.starts > 1


def surrogate_for(
    store: Store,
    data: ImageData,
    config: RunConfig,
    device: torch.device,
    workers: Workers,
    progress: Callable[[str, int, int], None] | None = None,
) -> str | None:
    """Folder of the networks that influence guidance needs, trained now if none is given.

    None if that guidance is off. The first of several processes trains on `device`, the others
    wait.
    """
    influence = config.sample.influence
    if influence.strength == 0 or influence.surrogate is not None:
        return influence.surrogate if influence.strength > 0 else None
    folder = store.path / SURROGATE
    if workers.first:
        own = SurrogateConfig(seed=config.seed)
        show = progress or (lambda *_: None)
        fit_surrogate(
            data, own, folder, device=device, progress=lambda _, *count: show(SURROGATE, *count)
        )
    workers.wait()
    return str(folder)
