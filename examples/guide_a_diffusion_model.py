"""Optimal-transport guidance of a DiT pipeline of diffusers.

With a model of your own: OTDiTPipeline.from_pretrained("FOLDER"), and real latents of your images.
This one is tiny and random, so what it samples is noise; that guidance brings these latents nearer
to the real ones can be seen all the same.

Run: python examples/guide_a_diffusion_model.py
"""

import torch

from otdd.distill import GuidanceConfig, OTDiTPipeline, OTGuidance
from otdd.distill.codec import import_diffusers

# `import diffusers`, which fails where torchvision was made for another torch; this mends it.
diffusers = import_diffusers()

torch.manual_seed(0)
transformer = diffusers.DiTTransformer2DModel(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=3,
)
vae = diffusers.AutoencoderKL(
    block_out_channels=(8, 8),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    latent_channels=4,
    norm_num_groups=4,
)
scheduler = diffusers.DDIMScheduler(clip_sample=False)
pipe = OTDiTPipeline(transformer.eval(), vae.eval(), scheduler)
pipe.set_progress_bar_config(disable=True)

# Real latents: with a real autoencoder, vae.encode(images).latent_dist.mean times
# vae.config.scaling_factor. Here a cloud around another mean for each class.
labels = torch.arange(3).repeat_interleave(40)
means = torch.randn(3, 4, 8, 8)
latents = means[labels] + 0.5 * torch.randn(120, 4, 8, 8)

guidance = OTGuidance(GuidanceConfig(target="x0", strength=0.5))
guidance.set_reference(latents, labels)

wanted = [0, 0, 1, 1, 2, 2]
costs = {}
for name, terms in (("unguided", None), ("guided", guidance)):
    generator = torch.Generator().manual_seed(1)
    made = pipe(
        wanted,
        guidance=terms,
        generator=generator,
        num_inference_steps=10,
        output_type="latent",
    ).images
    costs[name] = guidance.transport_cost(made, torch.tensor(wanted))
    print(f"{name:9}", "transport cost by class:", [round(c, 1) for c in costs[name].tolist()])

images = pipe(wanted, guidance=guidance, num_inference_steps=2).images
print(f"{len(images)} images of {images[0].size[0]} x {images[0].size[1]} pixels")
