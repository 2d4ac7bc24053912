"""The other terms of the update: each is the gradient of what it says, and refuses what it must."""

import pytest
import torch
from distill.surroundings import SURROUNDINGS
from distill.tiny import autoencoder
from torch import nn
from torch.nn import functional as F

from otdd.distill import (
    ConfigError,
    DiversityConfig,
    DiversityGuidance,
    InfluenceConfig,
    InfluenceGuidance,
    ModeConfig,
    ModeGuidance,
)
from otdd.distill.codec import AutoencoderCodec, PixelCodec

LABELS = torch.tensor([0, 1, 0])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Diversity


def test_diversity_is_the_gradient_of_the_largest_cosine():
    x, past = random(3, 1, 4, 4), random(9, 1, 4, 4, seed=1)
    memory = (past, torch.tensor([0, 1] * 4 + [1]))
    guidance = DiversityGuidance(DiversityConfig(strength=2.0, memory=3))
    move = guidance.direction(x, 0, LABELS, memory=memory)
    for n, label in enumerate(LABELS.tolist()):
        own = past[memory[1] == label][-3:].flatten(1)
        others = [x[m].flatten() for m in range(3) if m != n and LABELS[m] == label]
        row = x[n].flatten().requires_grad_()
        near = torch.cat([own, torch.stack(others)]) if others else own
        (want,) = torch.autograd.grad(F.cosine_similarity(row[None], near).max(), row)
        torch.testing.assert_close(move[n].flatten(), want)
    torch.testing.assert_close(guidance(x, 0, LABELS, memory=memory), x - 2 * move)


def test_diversity_of_a_lonely_image_is_nothing():
    guidance, x = DiversityGuidance(), random(2, 1, 4, 4)
    assert not guidance.direction(x, 0, torch.tensor([0, 1])).any()
    memory = (random(1, 1, 4, 4), torch.tensor([1]))
    move = guidance.direction(x, 0, torch.tensor([0, 1]), memory=memory)
    assert [bool(m.any()) for m in move] == [False, True]


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_whatever_is_set_around_it_diversity_is_the_same(name):
    x = random(3, 1, 4, 4)
    wanted = DiversityGuidance().direction(x, 0, LABELS)
    with SURROUNDINGS[name]():
        got = DiversityGuidance().direction(x, 0, LABELS)
    assert torch.equal(got, wanted)


# Modes


def test_images_of_a_class_go_to_modes_of_their_own():
    centres = 10 * torch.eye(4).view(4, 1, 2, 2)
    rows = (centres[[0, 1] * 6] + 0.01 * random(12, 1, 2, 2), centres[[2, 3] * 6])
    guidance = ModeGuidance(ModeConfig(strength=0.25))
    guidance.set_reference(torch.cat(rows), torch.tensor([0, 1]).repeat_interleave(12), 2)
    x, labels = random(5, 1, 2, 2), torch.tensor([0, 1, 0, 1, 0])
    modes = x - guidance.direction(x, 0, labels)
    found = [int(m.flatten().argmax()) for m in modes]
    assert {found[0], found[2]} == {0, 1}
    assert {found[1], found[3]} == {2, 3}
    assert found[4] == found[0]  # more images than modes
    memory = (random(1, 1, 2, 2), torch.tensor([0]))
    later = x[:1] - guidance.direction(x[:1], 0, labels[:1], memory=memory)
    torch.testing.assert_close(later, modes[2:3])  # the second image of the class
    torch.testing.assert_close(guidance(x, 0, labels), x + 0.25 * (modes - x))
    assert [guidance.active(k, 10) for k in range(10)] == [True] * 5 + [False] * 5


# Influence


class Small(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))
        torch.manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x):
        return self.head(x.double())


def influence(**settings):
    guidance = InfluenceGuidance(
        [Small(0).double(), Small(1).double()],
        lambda z: (z.double() + 1) / 2,
        InfluenceConfig(**{"strength": 5.0, **settings}),
    )
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return guidance, images, torch.arange(2).repeat_interleave(10)


def test_influence_is_one_minus_the_cosine_of_gradients(monkeypatch):
    monkeypatch.setattr("otdd.distill.influence.CHUNK", 3)
    guidance, images, labels = influence()
    guidance.set_reference(images, labels)
    x = random(1, 1, 4, 4).double()
    values = []
    for network in guidance.surrogates:

        def flat(pixels, label, network=network):
            loss = F.cross_entropy(network(pixels), torch.full((len(pixels),), label))
            parts = torch.autograd.grad(loss, list(network.parameters()))
            return torch.cat([p.flatten() for p in parts])

        own, real = flat((x + 1) / 2, 1), flat(images[labels == 1].double() / 255, 1)
        values.append(1 - F.cosine_similarity(own, real, dim=0))
    want = torch.stack(values).mean()
    torch.testing.assert_close(guidance.objective(x, 1), want, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in guidance.surrogates[0].parameters())


def test_influence_direction_is_its_gradient_and_lowers_it():
    guidance, images, labels = influence(target="x0")
    guidance.set_reference(images, labels)
    x, wanted = random(3, 1, 4, 4).double(), torch.tensor([1, 0, 1])
    with torch.no_grad():
        move = guidance.direction(x, 0, wanted)
    with torch.inference_mode():
        assert torch.equal(guidance.direction(x, 0, wanted), move)

    def objective(z, label):
        return float(guidance.objective(z, label).detach())

    for n, label in enumerate(wanted.tolist()):
        for pixel in ((0, 0), (2, 3)):
            shift = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
            shift[0, 0][pixel] = 1e-5
            at = [
                float(guidance.objective(x[n : n + 1] + s, label).detach()) for s in (shift, -shift)
            ]
            numeric = (at[0] - at[1]) / 2e-5
            assert float(move[n, 0][pixel]) == pytest.approx(numeric, rel=1e-4, abs=1e-8)
    better = guidance(x, 0, wanted, alpha_bar=0.5, output_rms=1.0)
    for n, label in enumerate(wanted.tolist()):
        after, before = (guidance.objective(z[n : n + 1], label) for z in (better, x))
        assert after < before


@pytest.mark.parametrize("codec", [PixelCodec(), AutoencoderCodec(autoencoder())])
def test_pixels_are_decoded_images_with_gradients(codec):
    shape = codec.latent_shape((1, 8, 8))
    if isinstance(codec, AutoencoderCodec):
        codec.grey = True
    z = (0.1 * random(2, *shape)).requires_grad_()
    pixels = codec.pixels(z)
    bytes_ = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    assert (bytes_.int() - codec.decode(z.detach()).int()).abs().max() <= 1
    (gradient,) = torch.autograd.grad(pixels.sum(), z)
    assert gradient.abs().sum() > 0


# What is refused


def test_terms_without_their_reference():
    x = random(3, 1, 4, 4)
    guidance, images, labels = influence()
    for term in (guidance, ModeGuidance()):
        with pytest.raises(RuntimeError, match="call set_reference first"):
            term(x, 0, LABELS, alpha_bar=0.5)
    guidance.set_reference(images[:10], labels[:10])
    modes = ModeGuidance()
    modes.set_reference(random(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64), 2)
    for term in (guidance, modes):
        with pytest.raises(ValueError, match=r"classes \[1\] have no"):
            term(x, 0, LABELS, alpha_bar=0.5)
    with pytest.raises(ValueError, match=r"latents of \(1, 5, 5\), the modes have \(1, 4, 4\)"):
        modes.check(torch.tensor([0]), (1, 5, 5))
    for count in (5, 2.5, "2"):
        with pytest.raises(ValueError, match=f"count: {count!r} is not accepted; expected 1 to 4"):
            modes.set_reference(random(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64), count)
    with pytest.raises(ValueError, match="alpha_bar is needed"):
        guidance(x[:1], 0, LABELS[:1])


def test_bad_input():
    with pytest.raises(ValueError, match="surrogates: an empty list"):
        InfluenceGuidance([], PixelCodec().pixels)
    with pytest.raises(ValueError, match=r"images must be uint8 \(R, C, H, W\)"):
        influence()[0].set_reference(random(2, 1, 4, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="surrogates: Sequential is not accepted; expected a list"):
        InfluenceGuidance(nn.Sequential(Small(0)), PixelCodec().pixels)
    guidance, images, labels = influence()
    for wrong, message in (
        (labels[:10], r"class_labels must be int64 of shape \(20,\), got torch.int64 \(10,\)"),
        (labels.tolist(), "class_labels must be a tensor, got list"),
        (labels + 1, "class_labels: 2 is not accepted; expected 0 to 1, the classes of the surr"),
        (labels - 100, "class_labels: -100 is not accepted"),  # which cross-entropy leaves out
    ):
        with pytest.raises(ValueError, match=message):
            guidance.set_reference(images, wrong)
    for config in (DiversityConfig, InfluenceConfig, ModeConfig):
        with pytest.raises(ConfigError, match=r"strength: -1 is not accepted"):
            config(strength=-1)
        with pytest.raises(ConfigError, match=r"window: \(0.5, 0.5\) is not accepted"):
            config(window=(0.5, 0.5))
    off = DiversityGuidance(DiversityConfig())  # until it has a strength
    assert not off.active(0, 1)
