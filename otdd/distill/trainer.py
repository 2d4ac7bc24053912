"""Training of a class-conditional DiT: weighted loss, averaged weights, checkpoints to the byte.

Every random draw of step s comes from (seed, s), so the state after a step is the weights that
are trained, their average and what AdamW keeps. A run that was interrupted and continued from its
checkpoint ends with the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from otdd.distill.codec import import_diffusers
from otdd.distill.config import ConfigError
from otdd.distill.locks import Held, locked
from otdd.distill.store import Store, StoreError
from otdd.distill.sums import InUseError
from otdd.distill.terms import rng

if TYPE_CHECKING:
    from otdd.distill.fit_config import FitConfig
    from otdd.distill.generator import Generator

Progress = Callable[[str, int, int, str], None]
Picture = Callable[["Generator", int], bytes]

WARM_UP = 0.05  # part of the steps
CLIP = 1.0  # largest norm of a gradient


class Trainer:
    """The weights in training, one step at a time.

    Args:
        model: a `DiTTransformer2DModel`; its parameters that require gradients are trained.
        latents: (N, c, h, w), scaled as the model's.
        labels: (N,), class of each latent.
        scheduler: configuration of the noise schedule, as in a generator.
        config: length, batch, learning rate and so on.
    """

    def __init__(
        self,
        model: nn.Module,
        latents: Tensor,
        labels: Tensor,
        scheduler: dict[str, Any],
        config: FitConfig,
    ) -> None:
        # eval: labels are dropped here, once an image; in training mode every block of the
        # diffusers model would drop them by itself.
        self.model = model.eval()
        self.latents, self.labels, self.config = latents, labels, config
        self.step, self.loss = 0, 0.0
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().clone() for n, p in self.trained.items()}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        # Every class as often as the others, however many images it has: a distilled set has the
        # same number of each.
        self.shares = 1.0 / torch.bincount(labels).float()[labels]
        settings: Any = model.config
        self.null_class = int(settings.num_embeds_ada_norm)
        self.loss_of = DiffusionLoss(scheduler, config.min_snr)

    def train_step(self) -> None:
        """One step of AdamW and of the average.

        Raises:
            ConfigError: the training diverges.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * _warm_cosine(self.step, self.config.steps)
        loss = self.loss_of(self.model, *self._batch())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), CLIP)
        self.optimizer.step()
        self.step += 1
        decay = min(self.config.ema, self.step / (self.step + 10))
        new = [p.detach() for p in self.trained.values()]
        torch._foreach_lerp_(list(self.average.values()), new, 1 - decay)
        value = loss.item()
        if not math.isfinite(value):
            raise ConfigError(
                f"lr: {self.config.lr} makes the training diverge: the loss is {value} after step "
                f"{self.step}; expected a smaller one"
            )
        self.loss = 0.99 * self.loss + 0.01 * value if self.step > 1 else value

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has its averaged weights for as long as the context lasts."""
        kept = {name: p.detach().clone() for name, p in self.trained.items()}
        self._set(self.average)
        try:
            yield
        finally:
            self._set(kept)

    def facts(self) -> dict[str, Any]:
        """Loss, and how many weights of how many are trained."""
        trained = sum(p.numel() for p in self.trained.values())
        weights = sum(p.numel() for p in self.model.parameters())
        return {"loss": round(self.loss, 6), "trained": trained, "weights": weights}

    def state(self) -> dict[str, Tensor]:
        """Everything a continued run needs."""
        tensors = {f"model.{k}": p.detach() for k, p in self.trained.items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in slots.items()}
        tensors["loss"] = torch.tensor(self.loss, dtype=torch.float64)
        return tensors

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Takes over what `state` gave after `step` steps."""
        self._set({k: tensors[f"model.{k}"] for k in self.trained})
        for name, kept in self.average.items():
            kept.copy_(tensors[f"average.{name}"])
        state = self.optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, slot = name.split(".")
                state["state"].setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict(state)
        self.step, self.loss = step, float(tensors["loss"])

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(values[name])

    def _batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents (B, c, h, w), labels (B,), timesteps (B,) and noise, where the model is."""
        config, stream = self.config, rng("fit", self.config.seed, self.step)
        pick = torch.multinomial(self.shares, config.batch, True, generator=stream)
        x0, labels = self.latents[pick], self.labels[pick]
        drop = torch.rand(config.batch, generator=stream) < config.label_dropout
        labels = labels.masked_fill(drop, self.null_class)
        if config.flip:
            mirror = torch.rand(config.batch, 1, 1, 1, generator=stream) < 0.5
            x0 = torch.where(mirror, x0.flip(-1), x0)
        t = torch.randint(self.loss_of.timesteps, (config.batch,), generator=stream)
        noise = torch.randn(x0.shape, generator=stream)
        device = next(self.model.parameters()).device
        return x0.to(device), labels.to(device), t.to(device), noise.to(device)


class DiffusionLoss:
    """Squared error of the prediction, weighted by min-SNR; and that of learned variances.

    The weight of x0_hat's squared error at t is SNR = abar / (1 - abar), at most gamma (Hang et al.
    2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", eq. 7) and at least 1
    (Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models") unless
    epsilon is predicted, which says nothing of x0 in pure noise. It is divided by SNR for epsilon
    and by SNR + 1 for v. A model with variances also gets the
    variational bound of them, its mean held fixed (Nichol & Dhariwal 2021, "Improved Denoising
    Diffusion Probabilistic Models", eq. 15 and 16), in bits a dimension as DiT has it; t = 0, whose
    term is a likelihood of pixels, is left out (ours).

    Args:
        scheduler: configuration of the noise schedule.
        min_snr: gamma; 0 weights all timesteps of the prediction alike.
    """

    def __init__(self, scheduler: dict[str, Any], min_snr: float) -> None:
        made = import_diffusers().DDIMScheduler.from_config(scheduler)
        self.kind = str(scheduler.get("prediction_type", "epsilon"))
        self.alpha_bar = made.alphas_cumprod.float()
        self.timesteps = len(self.alpha_bar)
        snr = made.alphas_cumprod.double()
        snr = snr / (1 - snr)
        scale = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.kind]
        least = 0.0 if self.kind == "epsilon" else 1.0
        weight = snr.clamp(least, min_snr) / scale if min_snr else torch.ones_like(snr)
        self.weight = weight.float()

    def __call__(
        self, model: nn.Module, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Mean loss of a batch: latents (B, c, h, w), labels (B,), timesteps (B,), noise."""
        abar = self.alpha_bar.to(t.device)[t].view(-1, 1, 1, 1)
        noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        out = model(noisy, timestep=t, class_labels=labels).sample
        predicted, variances = out[:, : x0.shape[1]], out[:, x0.shape[1] :]
        target = {
            "epsilon": noise,
            "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * x0,
            "sample": x0,
        }[self.kind]
        error = (predicted - target).square().flatten(1).mean(1)
        loss = (self.weight.to(t.device)[t] * error).mean()
        if variances.shape[1]:
            loss = loss + self._bound((predicted - target).detach(), variances, t)
        return loss

    def _bound(self, error: Tensor, variances: Tensor, t: Tensor) -> Tensor:
        """KL divergence of the true step to z_{t-1} from the model's, in bits a dimension.

        Both means are linear in the prediction, so they differ by a multiple of its error.
        """
        now = self.alpha_bar.double().to(t.device)
        before = torch.cat([now.new_ones(1), now[:-1]])
        beta = 1 - now / before
        posterior = beta * (1 - before) / (1 - now)
        # z_{t-1} has x0_hat times sqrt(before) beta / (1 - now); x0_hat has the prediction times:
        unit = {
            "epsilon": ((1 - now) / now).sqrt(),
            "v_prediction": (1 - now).sqrt(),
            "sample": torch.ones_like(now),
        }[self.kind]
        gain = before.sqrt() * beta / (1 - now) * unit
        posterior = posterior.clamp_min(posterior[1])

        def at(values: Tensor) -> Tensor:
            return values.float()[t].view(-1, 1, 1, 1)

        share = (variances + 1) / 2
        low, high = at(posterior.log()), at(beta.log())
        log_variance = share * high + (1 - share) * low
        moved = (at(gain) * error).square() * torch.exp(-log_variance)
        bits = 0.5 * (log_variance - low + torch.exp(low - log_variance) + moved - 1) / math.log(2)
        return (bits.flatten(1).mean(1) * (t > 0)).mean()


@contextlib.contextmanager
def alone(target: Path) -> Iterator[Store]:
    """The folder that a result is to be written to, held against a second training of it.

    Raises:
        StoreError: it cannot be written to, or another process makes the same result.
    """
    store = Store(target.parent)
    store.probe(target.name)
    try:
        with locked(target.parent / f".{target.name}.lock"):
            store.sweep(target.name, f"{target.name}.checkpoint")
            yield store
    except Held as holder:
        raise InUseError(
            f"{target} is being made by another otdd process ({holder}); wait for it"
        ) from None


def run(
    trainer: Trainer,
    store: Store,
    name: str,
    key: dict[str, Any],
    generator: Generator,
    picture: Picture,
    progress: Progress | None = None,
) -> None:
    """Trains to the last step, from the checkpoint of the same key if there is one.

    Args:
        trainer: as made.
        store: folder of the files.
        name: of the result; `NAME.checkpoint` and `NAME.grids/` lie beside it.
        key: what the result depends on (JSON).
        generator: of the model in training.
        picture: called as picture(generator, step) with averaged weights; returns a PNG.
        progress: called as progress("fit", step, steps, note).

    Raises:
        StoreError: the checkpoint is that of another training, or damaged.
        ConfigError: the training diverges.
        KeyboardInterrupt: on Ctrl-C, after the step in progress and its checkpoint; says so.
    """
    config, checkpoint = trainer.config, f"{name}.checkpoint"
    kept = _kept(store, name, key)
    if kept is not None:
        trainer.load(*kept)

    with _held_interrupt() as interrupted:
        while trainer.step < config.steps:
            if progress is not None:
                note = f"loss {trainer.loss:.4f}" if trainer.step else ""
                progress("fit", trainer.step, config.steps, note)
            trainer.train_step()
            step = trainer.step
            if config.grid_every and (step % config.grid_every == 0 or step == config.steps):
                with trainer.averaged():
                    made = picture(generator, step)
                store.write_bytes(f"{name}.grids/step-{step:06d}.png", made)
            if step == config.steps:
                break
            if interrupted.is_set() or step % config.checkpoint_every == 0:
                meta = {"key": key, "step": step}
                store.write_sealed(checkpoint, trainer.state(), meta)
            if interrupted.is_set():
                where = store.path / checkpoint
                raise KeyboardInterrupt(f"{step} of {config.steps} steps are kept in {where}")
    if progress is not None:
        progress("fit", config.steps, config.steps, f"loss {trainer.loss:.4f}")


def check_unfinished(target: Path, key: dict[str, Any]) -> None:
    """Refuses, touching nothing, where a result is to go but another training is on its way.

    Raises:
        StoreError: so it is, its checkpoint is damaged, or there can be no such folder.
    """
    store = Store(target.parent)
    store.require_folder()
    _kept(store, target.name, key)


def _kept(store: Store, name: str, key: dict[str, Any]) -> tuple[dict[str, Tensor], int] | None:
    """Tensors and step of the checkpoint beside a result, None where there is none.

    Raises:
        StoreError: it is that of another training, or damaged.
    """
    checkpoint = f"{name}.checkpoint"
    if not store.has(checkpoint):
        return None
    tensors, meta = store.read_sealed(checkpoint)
    refuse_other(store.path / checkpoint, meta.get("key"), key)
    return tensors, meta["step"]


def refuse_other(path: Path, old: dict[str, Any] | None, new: dict[str, Any]) -> None:
    """Raises `StoreError` for a finished result or a checkpoint of another training."""
    known = old or {}
    names = [k for k in new if known.get(k) != new[k]]
    if names:
        what = "; ".join(f"{k}: {known.get(k)!r} there, {new[k]!r} here" for k in names)
        what = what if old else "it does not say which"
        raise StoreError(f"{path} is of another training ({what}); choose another --out")


@contextlib.contextmanager
def _held_interrupt() -> Iterator[threading.Event]:
    """Sets the event on the first Ctrl-C; the second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return
    before = signal.getsignal(signal.SIGINT)

    def hold(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        asked.set()

    signal.signal(signal.SIGINT, hold)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _warm_cosine(step: int, steps: int) -> float:
    warm = max(1, round(steps * WARM_UP))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
