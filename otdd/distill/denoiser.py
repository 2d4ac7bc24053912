"""The adapter: any diffusers denoiser as one that is conditioned on a class.

The model is called as `model(z, timestep=t, **conditions)`, and what conditions it is a table with
one row per class and, last, one for "no class":

    Denoiser(dit)                                           # a DiT: its class embeddings
    Denoiser(unet, {"class_labels": torch.arange(K + 1)})   # a class-conditional U-Net
    Denoiser(pipe.unet, {"encoder_hidden_states": texts})   # Stable Diffusion: a prompt per class

For the last, `texts` (K + 1, L, D) are the embeddings of K prompts and of the empty one. PixArt
takes `encoder_attention_mask` (K + 1, L) beside them; arguments that are mappings, such as
`added_cond_kwargs`, hold tables too. `denoise` samples with the result and with any guidance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Conditions = Mapping[str, Any]


class Denoiser:
    """A denoiser with its conditions by class.

    Args:
        model: any diffusers model whose output has `sample`.
        conditions: keyword arguments of the model as tables, (K + 1, ...), or mappings of tables;
            without them the model is a `DiTTransformer2DModel`.
        null: whether the last row is "no class"; without it there is no classifier-free guidance.
    """

    def __init__(
        self, model: nn.Module, conditions: Conditions | None = None, *, null: bool = True
    ) -> None:
        if conditions is None:
            known = getattr(model.config, "num_embeds_ada_norm", None)
            if known is None:
                raise ValueError(
                    f"conditions: {type(model).__name__} has no class embeddings of a DiT; give "
                    "its keyword arguments as tables, one row per class and one for no class"
                )
            conditions = {"class_labels": torch.arange(known + 1)}
        if not isinstance(conditions, Mapping):
            seen = type(conditions).__name__
            raise ValueError(f"conditions: {seen} is not accepted; expected a mapping of tables")
        rows = {name: len(table) for name, table in _tables(conditions)}
        if not rows or len(set(rows.values())) != 1 or min(rows.values()) <= null:
            raise ValueError(
                f"conditions: tables of {rows} rows; expected one row per class"
                f"{' and one for no class' * null}, the same number in every table"
            )
        self.model, self.conditions, self.null = model, conditions, null
        self.num_classes = next(iter(rows.values())) - null

    def predict(
        self,
        z: Tensor,
        t: Tensor | int,
        class_labels: Tensor,
        guidance_scale: float = 1.0,
        *,
        batch: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the model predicts, with classifier-free guidance.

        Guidance acts on the channels of the latents; learned variances stay conditional. Where
        gradients are kept and `batch` splits the latents, each part is computed again in the
        backward pass, so that memory is that of one part.

        Args:
            z: noisy latents, (B, c, h, w).
            t: timestep, a number or (B,).
            class_labels: (B,), below `num_classes`, which itself is "no class".
            guidance_scale: 1 is the plain conditional model.
            batch: most latents in one call of the model.

        Returns:
            Prediction (B, c, h, w), and the variance channels or None.

        Raises:
            ValueError: labels or a scale this model cannot take; values of labels are looked at
                on the CPU.
        """
        self._check_rows(z, class_labels)
        self._require_null(guidance_scale)
        if batch is not None and (not isinstance(batch, Integral) or batch < 1):
            raise ValueError(f"batch: {batch!r} is not accepted; expected an integer >= 1")
        class_labels = class_labels.long()  # rows of uint8 would be a mask
        t = torch.as_tensor(t, device=z.device).expand(len(z))
        size = batch or len(z)
        calls = list(zip(z.split(size), t.split(size), class_labels.split(size), strict=True))
        again = torch.is_grad_enabled() and z.requires_grad and len(calls) > 1
        if again:
            parts = [self._recomputed(*call, guidance_scale) for call in calls]
        else:
            parts = [self._predict(*call, guidance_scale) for call in calls]
        predicted = torch.cat([p for p, _ in parts])
        rest = [r for _, r in parts if r is not None]
        return predicted, torch.cat(rest) if rest else None

    def check(self, class_labels: Tensor, guidance_scale: float) -> None:
        """Raises `ValueError`, before any work, for labels or a scale this model cannot take."""
        _require_below(class_labels, self.num_classes)
        self._require_null(guidance_scale)

    def _check_rows(self, z: Tensor, class_labels: Tensor) -> None:
        """Refuses labels that are no rows of the tables, the one for no class among them."""
        if not isinstance(class_labels, Tensor):
            seen = type(class_labels).__name__
            raise ValueError(f"class_labels must be a tensor, got {seen}")
        if class_labels.shape != z.shape[:1]:
            seen = tuple(class_labels.shape)
            raise ValueError(f"class_labels: shape {seen} is not accepted; expected ({len(z)},)")
        kind = class_labels.dtype
        if kind.is_floating_point or kind.is_complex or kind == torch.bool:
            raise ValueError(f"class_labels: {kind} is not accepted; expected integers")
        if class_labels.device.type == "cpu":
            _require_below(class_labels, self.num_classes + self.null)

    def _require_null(self, guidance_scale: float) -> None:
        if guidance_scale != 1.0 and not self.null:
            raise ValueError(
                f"guidance_scale: {guidance_scale} needs a row for no class (null=True)"
            )

    def _predict(
        self, z: Tensor, t: Tensor, labels: Tensor, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        weight = next(self.model.parameters())
        model_input, times, rows = z.to(weight.dtype), t, labels
        if scale != 1.0:
            null = torch.full_like(labels, self.num_classes)
            model_input, times = torch.cat([model_input] * 2), torch.cat([t, t])
            rows = torch.cat([labels, null])
        chosen = _choose(self.conditions, rows, weight.dtype)
        out = self._call(model_input, {"timestep": times, **chosen}).to(z.dtype)
        channels = z.shape[1]
        out, rest = out[:, :channels], out[: len(z), channels:]
        if scale != 1.0:
            conditional, free = out.chunk(2)
            out = free + scale * (conditional - free)
        return out, rest if rest.shape[1] == channels else None

    def _recomputed(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        # Nothing here is random, and models are in evaluation mode: no random state to keep.
        return checkpoint(self._predict, *arguments, use_reentrant=False, preserve_rng_state=False)

    def _call(self, model_input: Tensor, arguments: dict[str, Any]) -> Tensor:
        named = dict(self.model.named_parameters()) if torch.is_grad_enabled() else {}
        if any(p.requires_grad for p in named.values()):
            if getattr(self.model, "is_gradient_checkpointing", False):
                raise ValueError(
                    "model: gradient checkpointing of weights that take gradients is not accepted "
                    "by a term that goes through it; call disable_gradient_checkpointing(), or "
                    "requires_grad_(False)"
                )
            # Gradients are for the latents: nothing is to be kept for those of weights.
            frozen = {name: p.detach() for name, p in named.items()}
            return torch.func.functional_call(self.model, frozen, (model_input,), arguments).sample
        return self.model(model_input, **arguments).sample


def _require_below(class_labels: Tensor, end: int) -> None:
    wrong = [k for k in class_labels.tolist() if not 0 <= k < end]
    if wrong:
        raise ValueError(f"class_labels: {wrong[0]} is not accepted; expected 0 to {end - 1}")


def _tables(conditions: Conditions, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in conditions.items():
        if isinstance(value, Mapping):
            yield from _tables(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor) and value.ndim >= 1:
            yield prefix + name, value
        else:
            raise ValueError(f"conditions: {prefix}{name} is no tensor with a row per class")


def _choose(conditions: Conditions, rows: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The rows of every table, on the device of the labels and in the type of the model."""
    chosen: dict[str, Any] = {}
    for name, value in conditions.items():
        if isinstance(value, Mapping):
            chosen[name] = _choose(value, rows, dtype)
        else:
            picked = value.to(rows.device)[rows]
            chosen[name] = picked.to(dtype) if picked.is_floating_point() else picked
    return chosen
