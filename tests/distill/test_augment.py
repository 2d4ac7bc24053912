"""Augmentation: drawn from counters, replayed to the bit."""

import pytest
import torch

from otdd.distill.augment import Augmentation, augmentation, generator, stack, unstack
from otdd.distill.config import RelabelConfig

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
