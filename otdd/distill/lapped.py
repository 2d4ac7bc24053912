"""`LappedDiT`: a DiT whose patches overlap, in and out, at the cost of a plain one.

Patches lie p apart and are 2p wide. Each token reads its wide patch and writes one, and where they
overlap they add up, as in a lapped transform (Malvar 1990, "Lapped Transforms for Efficient
Transform/Subband Coding"). A plain DiT has to learn by attention alone how its patches meet, which
takes small models long: until then their samples have seams.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from otdd.distill.codec import import_diffusers

import_diffusers()

from diffusers.models.modeling_outputs import Transformer2DModelOutput  # noqa: E402
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel  # noqa: E402


class LappedDiT(DiTTransformer2DModel):
    """A `DiTTransformer2DModel` with overlapping patches; takes the same configuration."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        made: Any = self  # attributes of diffusers' own types
        made.register_to_config(lapped=True)
        patch, channels = self.patch_size, self.out_channels
        before = patch // 2
        wide = nn.Conv2d(config["in_channels"], self.inner_dim, 2 * patch, stride=patch)
        made.pos_embed.proj = nn.Sequential(nn.ZeroPad2d((before, patch - before) * 2), wide)
        # The output of a wide patch as four of the plain size.
        self.out_channels = 4 * channels
        self.proj_out_2 = nn.Linear(self.inner_dim, patch * patch * self.out_channels)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As that of `DiTTransformer2DModel`: (B, c, h, w) to an output with `sample`."""
        (quarters,) = super().forward(hidden_states, *args, **{**kwargs, "return_dict": False})
        sample = self._laid_over(quarters)
        if kwargs.get("return_dict", True):
            return Transformer2DModelOutput(sample=sample)
        return (sample,)

    def _laid_over(self, quarters: Tensor) -> Tensor:
        """The sum of wide patches where they belong: (B, 4c, h, w) to (B, c, h, w)."""
        patch, (height, width) = self.patch_size, quarters.shape[-2:]
        before = patch // 2
        places = ((0, 0), (0, patch), (patch, 0), (patch, patch))
        parts = [
            F.pad(part, (x, patch - x, y, patch - y))
            for part, (y, x) in zip(quarters.chunk(4, 1), places, strict=True)
        ]
        laid = sum(parts[1:], parts[0])
        return laid[..., before : before + height, before : before + width]
