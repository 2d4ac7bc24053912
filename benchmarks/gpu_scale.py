"""What the ops are part of, for scale: steps of DiT-XL/2-256, of its guidance and of ResNet-18.

Weights are random; the time does not depend on them.
"""

import importlib.util
import statistics
from collections.abc import Callable

import gpu_contenders
import gpu_floors
import torch
from torch import Tensor, nn

from otdd import _torchvision

IMAGES, CHUNK, GUIDANCE = 4096, 256, 4.0
CLASSES, REAL = 64, 1300  # real latents of each class
BATCH = 1024


class Block(nn.Module):
    """A block of DiT with adaLN-Zero (Peebles & Xie 2023)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        parts = self.modulation(nn.functional.silu(c)).unsqueeze(1).chunk(6, -1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        h = self.norm(x) * (1 + scale_1) + shift_1
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        h = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + gate_1 * self.out(h.transpose(1, 2).flatten(2))
        return x + gate_2 * self.mlp(self.norm(x) * (1 + scale_2) + shift_2)


class StandIn(nn.Module):
    """The layers of DiT-XL/2 but for the embeddings of time and class: one vector a class."""

    def __init__(self, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.classes = nn.Embedding(1001, width)
        self.patches = nn.Conv2d(4, width, 2, 2)
        self.places = nn.Parameter(torch.zeros(1, 256, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation, self.last = nn.Linear(width, 2 * width), nn.Linear(width, 32)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        c = self.classes(labels)
        x = self.patches(z).flatten(2).mT + self.places
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(nn.functional.silu(c)).unsqueeze(1).chunk(2, -1)
        x = self.last(self.norm(x) * (1 + scale) + shift)
        x = x.unflatten(-1, (2, 2, 8)).unflatten(1, (16, 16))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 8, 32, 32)


def dit(layers: int = 28, heads: int = 16, head: int = 72) -> tuple[str, nn.Module, Callable]:
    """What it is, the model, and ``predict(model, z, labels) -> (n, 8, 32, 32)``."""
    if importlib.util.find_spec("diffusers") is None:
        told = "stand-in of the same layers in plain PyTorch: diffusers is not installed"
        return told, StandIn(layers, heads, heads * head), lambda model, z, y: model(z, y)
    _torchvision.repair()
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head, in_channels=4, out_channels=8,
        num_layers=layers, attention_bias=True, sample_size=32, patch_size=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )  # fmt: skip

    def predict(model: nn.Module, z: Tensor, labels: Tensor) -> Tensor:
        return model(z, timestep=torch.full_like(labels, 500), class_labels=labels).sample

    return "diffusers", model.eval(), predict


def guided(model: nn.Module, predict: Callable, z: Tensor, labels: Tensor) -> Tensor:
    """Classifier-free guidance on the first three channels, as DiT's own code has it."""
    null = torch.full_like(labels, 1000)
    out = predict(model, torch.cat([z, z]), torch.cat([labels, null]))
    with_class, without = out[:, :3].chunk(2)
    return without + GUIDANCE * (with_class - without)


def dit_step() -> tuple[str, Callable]:
    with torch.device("cuda"):
        told, model, predict = dit()
        model = model.to(torch.bfloat16)
        z = torch.randn(IMAGES, 4, 32, 32, dtype=torch.bfloat16)
        labels = torch.randint(1000, (IMAGES,))

    @torch.no_grad()
    def step() -> None:
        for part, classes in zip(z.split(CHUNK), labels.split(CHUNK), strict=True):
            guided(model, predict, part, classes)

    return f"{told}; {CHUNK} images at a time", step


def guidance_step(graph: bool, **settings: object) -> Callable[[], tuple[str, Callable]]:
    """Of `OTGuidance`, on latents of DiT; real ones as many a class as ImageNet has."""

    def make() -> tuple[str, Callable]:
        from otdd.distill.config import GuidanceConfig
        from otdd.distill.guidance import OTGuidance

        guidance = OTGuidance(GuidanceConfig(reference_size=REAL, **settings))
        labels = torch.arange(CLASSES, device="cuda")
        real = torch.randn(CLASSES * REAL, 4, 32, 32, device="cuda")
        guidance.set_reference(real, labels.repeat_interleave(REAL))
        labels = labels.repeat_interleave(IMAGES // CLASSES)
        x = torch.randn(IMAGES, 4, 32, 32, device="cuda")

        def step() -> None:
            guidance(x, 0, labels, alpha_bar=0.5)

        if graph:
            return "a CUDA graph", gpu_contenders.captured(step)
        return "eager", step

    return make


def resnet_step() -> tuple[str, Callable]:
    _torchvision.repair()
    if importlib.util.find_spec("timm") is not None:
        import timm

        told, model = "timm", timm.create_model("resnet18")
    else:
        from torchvision import models

        told, model = "torchvision: timm is not installed", models.resnet18()
    model = model.to("cuda", memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(BATCH, 3, 224, 224, device="cuda")
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (BATCH,), device="cuda")

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()

    return f"{told}; 224x224, bf16 autocast, SGD", step


L1 = {"form": "gradient", "metric": "l1", "repulsion": 0.0}
STEPS = {
    f"DiT-XL/2-256, a bf16 step with CFG for {IMAGES} images": (dit_step, 3),
    f"guidance of {IMAGES} images of {CLASSES} classes, defaults": (guidance_step(False), 10),
    f"guidance of {IMAGES} images of {CLASSES} classes, defaults, graph": (guidance_step(True), 10),
    f"guidance of {IMAGES} images of {CLASSES} classes, L1 gradient": (
        guidance_step(False, **L1),
        10,
    ),
    f"guidance of {IMAGES} images of {CLASSES} classes, L1 gradient, graph": (
        guidance_step(True, **L1),
        10,
    ),
    f"ResNet-18, a training step of {BATCH} images": (resnet_step, 10),
}


def measure(name: str) -> dict:
    """Median time of a step, or the reason why there is none."""
    make, rounds = STEPS[name]
    try:
        told, step = make()
        step()
        times = [1e3 * gpu_floors.seconds(step, 1) for _ in range(rounds)]
    except Exception as error:
        return {"reason": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"what": told, "median_ms": statistics.median(times), "rounds": rounds}
