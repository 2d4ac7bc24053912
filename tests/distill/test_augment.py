"""Augmentation: drawn from counters, replayed to the bit."""

import dataclasses

import pytest
import torch

from otdd.distill.augment import Augmentation, augmentation, generator, stack, unstack
from otdd.distill.config import ConfigError, RelabelConfig

FULL = Augmentation((0.5, 1.0), shift=0.1, rotate=10, zoom=0.1, flip=True, cutmix=1.0)
IMAGES = torch.rand(6, 3, 16, 16, generator=generator("images"))


def draw(augment=FULL, epoch=3, step=1, count=6, batch=4):
    return augment.draw(count, batch, (16, 16), seed=7, epoch=epoch, step=step)


def test_drawn_from_counters_alone():
    first = draw()
    torch.rand(5)
    draw(epoch=9)
    again = draw()
    assert torch.equal(first.apply(IMAGES), again.apply(IMAGES))
    assert not torch.equal(first.theta, draw(step=0).theta)
    assert not torch.equal(first.theta, draw(epoch=4).theta)


def test_stored_and_replayed_bit_exact():
    batches = [draw(step=0), draw(step=1)]
    for one, other in zip(batches, unstack(stack(batches)), strict=True):
        assert torch.equal(one.apply(IMAGES), other.apply(IMAGES))


def test_no_augmentation_is_the_image():
    batch = Augmentation().draw(6, 6, (16, 16), seed=0, epoch=0, step=0)
    torch.testing.assert_close(batch.apply(IMAGES), IMAGES[batch.index], atol=1e-5, rtol=0)
    assert batch.targets(torch.arange(6), 6, (16, 16)).argmax(1).tolist() == batch.index.tolist()


def test_bytes_and_fractions_are_the_same_images():
    whole = (IMAGES * 255).round().to(torch.uint8)
    assert torch.equal(draw().apply(whole), draw().apply(whole.float() / 255))


@pytest.mark.parametrize(("count", "batch"), [(10, 4), (5, 5), (3, 50)])
def test_an_epoch_sees_every_image(count, batch):
    size = min(count, batch)
    steps = -(-count // size)
    drawn = [
        Augmentation().draw(count, batch, (8, 8), seed=0, epoch=1, step=s).index
        for s in range(steps)
    ]
    assert all(len(index) == size for index in drawn)
    assert set(torch.cat(drawn).tolist()) == set(range(count))


def test_flip_mirrors():
    batch = Augmentation(flip=True).draw(6, 6, (16, 16), seed=0, epoch=0, step=0)
    out, plain = batch.apply(IMAGES), IMAGES[batch.index]
    mirrored = batch.theta[:, 0, 0] < 0
    assert mirrored.any()
    assert not mirrored.all()
    expected = torch.where(mirrored.view(-1, 1, 1, 1), plain.flip(-1), plain)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_crops_stay_inside_and_keep_their_area():
    augment = Augmentation(crop_scale=(0.5, 1.0))
    theta = augment.draw(500, 500, (32, 32), seed=0, epoch=0, step=0).theta
    half = theta[:, [0, 1], [0, 1]]
    assert (theta[:, :, 2].abs() + half <= 1 + 1e-6).all()
    area = half.prod(1)
    assert 0.45 < area.min() < 0.55
    assert area.max() <= 1


def test_cutmix_labels_are_the_pasted_area():
    batch = draw(Augmentation(cutmix=1.0), count=6, batch=6)
    marks = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 16, 16) / 6
    labels = torch.arange(6)
    targets = batch.targets(labels, 6, (16, 16))
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    pixels = (batch.apply(marks) * 6).round().long().flatten(1)
    seen = torch.stack([torch.bincount(row, minlength=6) / 256 for row in pixels])
    torch.testing.assert_close(targets, seen.float(), atol=1e-6, rtol=0)


def test_tiny_images_are_jittered_and_digits_never_flipped():
    config = RelabelConfig()
    tiny = augmentation(config, "digits", (8, 8))
    assert (tiny.crop_scale, tiny.flip, tiny.shift) == ((1.0, 1.0), False, 0.5 / 8)
    large = augmentation(config, "flowers", (32, 32))
    assert (large.crop_scale, large.flip, large.rotate) == ((0.5, 1.0), True, 0.0)
    assert augmentation(RelabelConfig(flip="on"), "digits", (8, 8)).flip


MIXUP = Augmentation(mixup=1.0, mixup_alpha=0.8)
SHUFFLE = Augmentation(patch_shuffle=2)


def test_without_mixup_and_shuffle_nothing_changes():
    """What is drawn for the rest does not depend on them, and they add no tensors to files."""
    plain, more = FULL, dataclasses.replace(FULL, mixup=0.5, patch_shuffle=4)
    one, other = draw(plain), draw(more)
    for name in ("index", "theta", "partner", "box"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert set(stack([one])) == {"index", "theta", "partner", "box"}
    assert set(stack([other])) == {"index", "theta", "partner", "box", "blend", "patches"}


def test_mixup_mixes_images_and_labels_alike():
    batch = draw(MIXUP, count=6, batch=6)
    share = float(batch.blend)
    assert 0 < share < 1
    plain = dataclasses.replace(batch, blend=None)
    x, labels = plain.apply(IMAGES), torch.arange(6)
    expected = (1 - share) * x + share * x[batch.partner]
    torch.testing.assert_close(batch.apply(IMAGES), expected)
    targets, hot = batch.targets(labels, 6, (16, 16)), plain.targets(labels, 6, (16, 16))
    torch.testing.assert_close(targets, (1 - share) * hot + share * hot[batch.partner])
    assert batch.mixed
    assert not plain.mixed


def test_weights_of_mixup_are_of_the_beta_distribution():
    drawn = [float(draw(MIXUP, epoch=e).blend) for e in range(2000)]
    seen = torch.tensor(drawn, dtype=torch.float64)
    # Of Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)).
    assert seen.mean() == pytest.approx(0.5, abs=0.03)
    assert seen.var() == pytest.approx(1 / (4 * 2.6), rel=0.1)


def test_mixup_of_a_tiny_shape_takes_one_image_or_the_other():
    drawn = [
        float(draw(dataclasses.replace(MIXUP, mixup_alpha=1e-12), epoch=e).blend) for e in range(50)
    ]
    assert set(drawn) == {0.0, 1.0}


def test_a_batch_is_mixed_in_one_way_only():
    both = Augmentation(cutmix=0.5, mixup=0.5)
    kinds = {"cutmix": 0, "mixup": 0, "none": 0}
    for epoch in range(400):
        batch = draw(both, epoch=epoch)
        top, bottom, left, right = batch.box.tolist()
        boxed, blended = bottom > top and right > left, float(batch.blend) > 0
        assert not (boxed and blended)
        kinds["cutmix" if boxed else "mixup" if blended else "none"] += 1
        assert batch.mixed == (boxed or blended)
    assert kinds["cutmix"] == pytest.approx(200, abs=40)
    assert kinds["mixup"] == pytest.approx(100, abs=35)


@pytest.mark.parametrize(("side", "size"), [(2, (16, 16)), (4, (16, 16)), (3, (6, 9))])
def test_patches_change_places(side, size):
    images = torch.rand(5, 3, *size, generator=generator("patches"))
    batch = Augmentation(patch_shuffle=side).draw(5, 5, size, seed=0, epoch=0, step=0)
    out, plain = batch.apply(images), images[batch.index]
    high, wide = size[0] // side, size[1] // side
    assert not torch.equal(out, plain)
    for image, (row, order) in enumerate(zip(plain, batch.patches.tolist(), strict=True)):
        assert sorted(order) == list(range(side * side))
        for place, source in enumerate(order):
            (y, x), (v, u) = divmod(place, side), divmod(source, side)
            seen = out[image, :, y * high : (y + 1) * high, x * wide : (x + 1) * wide]
            from_ = row[:, v * high : (v + 1) * high, u * wide : (u + 1) * wide]
            torch.testing.assert_close(seen, from_, atol=1e-5, rtol=0)


def test_mixup_and_shuffle_are_stored_and_replayed_bit_exact():
    augment = dataclasses.replace(FULL, cutmix=0.3, mixup=0.7, patch_shuffle=4)
    batches = [draw(augment, epoch=e) for e in range(6)]
    assert {b.mixed for b in batches} == {True, False}
    for one, other in zip(batches, unstack(stack(batches)), strict=True):
        assert torch.equal(one.apply(IMAGES), other.apply(IMAGES))


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"relabel.patch_shuffle: 3 .* both sides .* 16 and 16"):
        augmentation(RelabelConfig(patch_shuffle=3), "textures", (16, 16))
    assert augmentation(RelabelConfig(patch_shuffle=4), "textures", (16, 16)).patch_shuffle == 4


@pytest.mark.parametrize(
    "wrong", [{"mixup": 1.5}, {"mixup_alpha": 0.0}, {"mixup_alpha": 1.5}, {"patch_shuffle": 0}]
)
def test_bad_settings_are_named(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ConfigError, match=rf"{name}: {value} is not accepted"):
        RelabelConfig(**wrong)
