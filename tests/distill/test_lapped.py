"""Patches of a LappedDiT: where they lie, what they read, and that generators keep them."""

import pytest
import torch
from distill import tiny

from otdd.distill.fit import FitConfig, fit, transformer_config
from otdd.distill.generator import Generator, build_transformer

SIZES = [(8, 2), (9, 3), (7, 1), (16, 8), (10, 5)]  # side, patch


def lapped(side: int, patch: int, channels: int = 1):
    """A model of random weights whose blocks are identities, so that tokens keep to themselves."""
    config = FitConfig(width=32, layers=1, patch_size=patch)
    made = tiny.randomise(build_transformer(transformer_config(config, (channels, side, side), 3)))
    for layer in (made.transformer_blocks[0].norm1.linear, made.proj_out_1):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return made


def run(model, z):
    labels = torch.zeros(len(z), dtype=torch.int64)
    return model(z, timestep=labels + 5, class_labels=labels).sample


def windows(side: int, patch: int) -> list[range]:
    """Rows (or columns) of every wide patch that are in the image."""
    before = patch // 2
    return [
        range(max(0, start - before), min(side, start - before + 2 * patch))
        for start in range(0, side, patch)
    ]


@pytest.mark.parametrize(("side", "patch"), SIZES)
def test_patches_are_twice_as_wide_as_they_lie_apart(side, patch):
    model = lapped(side, patch, channels=3)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.ones_(model.proj_out_2.bias)  # every patch adds 1 where it lies
    counts = torch.tensor([sum(row in w for w in windows(side, patch)) for row in range(side)])
    out = run(model, torch.zeros(2, 3, side, side))
    assert torch.equal(out, torch.outer(counts, counts).float().expand(2, 3, side, side))


@pytest.mark.parametrize(("side", "patch"), SIZES)
def test_a_token_reads_the_patch_that_it_writes(side, patch):
    model, known = lapped(side, patch), windows(side, patch)
    z = torch.randn(1, 1, side, side, requires_grad=True)
    out = run(model, z)
    for y, x in ((0, 0), (side // 2, side - 1), (side // 2 - 1, side // 2)):
        (gradient,) = torch.autograd.grad(out[0, 0, y, x], z, retain_graph=True)
        read = torch.zeros(side, side, dtype=torch.bool)
        for rows in (w for w in known if y in w):
            for columns in (w for w in known if x in w):
                read[rows.start : rows.stop, columns.start : columns.stop] = True
        assert torch.equal(gradient[0, 0] != 0, read)


def test_the_four_quarters_lie_where_they_were_read():
    # Tokens that hand on what they read, each pixel of a quarter in a channel of its own.
    side, patch = 8, 2
    model = lapped(side, patch)
    wide = model.pos_embed.proj[1]
    for layer in (wide, model.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    for y in range(2 * patch):
        for x in range(2 * patch):
            quarter, pixel = y // patch * 2 + x // patch, y % patch * patch + x % patch
            wide.weight.data[y * 2 * patch + x, 0, y, x] = 1
            model.proj_out_2.weight.data[pixel * 4 + quarter, y * 2 * patch + x] = 1
    model.norm_out = torch.nn.Identity()
    model.pos_embed.pos_embed.zero_()
    z = torch.randn(2, 1, side, side)
    counts = torch.tensor([sum(row in w for w in windows(side, patch)) for row in range(side)])
    torch.testing.assert_close(run(model, z), z * torch.outer(counts, counts))


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (9, 3), (32, 3), (64, 1)])
def test_generators_keep_their_lapped_patches(tmp_path, side, channels):
    config = FitConfig(width=32, layers=1, steps=2, batch=4, lr=1e-2, grid_every=0)
    data = tiny.images((4, 4), side=side, channels=channels)
    made = fit(data, config, tmp_path / "g.safetensors")
    again = Generator.load(tmp_path / "g.safetensors")
    assert type(again.transformer).__name__ == "LappedDiT"
    assert again.latent_shape == (channels, side, side)
    assert not again.learned_sigma
    z, labels = torch.randn(2, channels, side, side), torch.tensor([0, 1])
    first, second = (g.predict(z, 500, labels, 2.0)[0] for g in (made, again))
    assert first.shape == z.shape
    assert first.abs().sum() > 0
    assert torch.equal(first, second)


def test_dits_of_other_files_stay_plain():
    config = transformer_config(FitConfig(width=32, layers=1), (1, 8, 8), 3)
    plain = build_transformer({k: v for k, v in config.items() if k != "lapped"})
    assert type(plain).__name__ == "DiTTransformer2DModel"
    assert "lapped" not in plain.config


def test_outputs_as_a_tuple():
    model, z = lapped(8, 2), torch.randn(1, 1, 8, 8)
    label = torch.zeros(1, dtype=torch.int64)
    (plain,) = model(z, timestep=label, class_labels=label, return_dict=False)
    assert torch.equal(plain, model(z, timestep=label, class_labels=label).sample)
