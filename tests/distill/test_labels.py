"""Formats of soft labels: what they keep, what they weigh, what they refuse."""

from pathlib import Path

import label_storage
import pytest
import torch

from otdd.distill.augment import Augmentation, generator, stack, unstack
from otdd.distill.config import ConfigError, RelabelConfig
from otdd.distill.labels import LabelFormat, compact, storage

ROOT = Path(__file__).parents[2]
FORMATS = (LabelFormat(), LabelFormat("topk", 4), LabelFormat("q8"), LabelFormat("q4"))


def logits(classes=1000, rows=64):
    """Peaked rows, as teachers give them."""
    made = 2 * torch.randn(rows, classes, generator=generator("labels", classes))
    made[torch.arange(rows), torch.arange(rows) % classes] += 12
    return made.half()


@pytest.mark.parametrize("labels", FORMATS, ids=lambda f: f.kind)
def test_weighs_what_it_says(labels):
    made = labels.encode(logits())
    weight = sum(t.numel() * t.element_size() for t in made.values())
    assert weight == 64 * labels.row_bytes(1000)
    assert labels.row_bytes(1000) == {"fp16": 2000, "topk": 18, "q8": 1008, "q4": 508}[labels.kind]


def test_half_precision_is_kept():
    assert torch.equal(FORMATS[0].decode(FORMATS[0].encode(logits()), 1000), logits().float())
    assert FORMATS[0].meta() == {}
    assert all(LabelFormat.read(f.meta()) == f for f in FORMATS)


@pytest.mark.parametrize("classes", [10, 256, 257, 1000, 40000])
def test_top_k_keeps_the_largest_and_the_mass_of_the_others(classes):
    want = logits(classes, rows=4).float()
    got = FORMATS[1].decode(FORMATS[1].encode(want.half()), classes)
    top = want.topk(4).indices
    assert torch.equal(got.gather(1, top), want.gather(1, top))
    torch.testing.assert_close(got.logsumexp(1), want.logsumexp(1), rtol=0, atol=2e-3)
    assert (got.scatter(1, top, -torch.inf).amax(1) <= want.gather(1, top).amin(1)).all()


@pytest.mark.parametrize(("kind", "levels"), [("q8", 255), ("q4", 15)])
@pytest.mark.parametrize("classes", [2, 7, 1000])  # an odd number leaves half a byte over
def test_few_bits_are_off_by_half_a_level(kind, levels, classes):
    want = torch.cat([logits(classes), torch.full((1, classes), 3.0).half()]).float()
    labels = LabelFormat(kind)
    got = labels.decode(labels.encode(want.half()), classes)
    level = (want.amax(1) - want.amin(1)) / levels
    assert ((got - want).abs().amax(1) <= 0.5001 * level).all()
    assert torch.equal(got[-1], want[-1])


@pytest.mark.parametrize("labels", FORMATS[1:], ids=lambda f: f.kind)
def test_infinite_logits_are_refused(labels):
    with pytest.raises(ValueError, match=r"^logits: got inf at index \(0, 3\)"):
        labels.encode(torch.tensor([[0, 0, 0, torch.inf, 1]]).half())


def test_top_k_is_less_than_the_classes():
    config = RelabelConfig(label_format="topk", top_k=10)
    with pytest.raises(ConfigError, match=r"relabel.top_k: 10 .* fewer than the 10 classes"):
        LabelFormat.of(config, 10)
    assert LabelFormat.of(config, 11) == LabelFormat("topk", 10)
    assert LabelFormat.of(RelabelConfig(top_k=10), 10) == LabelFormat()


@pytest.mark.parametrize("labels", FORMATS, ids=lambda f: f.kind)
def test_storage_is_that_of_the_tensors(labels):
    draw = Augmentation(cutmix=0.5).draw
    batches = [draw(70, 30, (8, 8), seed=0, epoch=e, step=s) for e in range(2) for s in range(3)]
    drawn = stack(batches) if labels.kind == "fp16" else compact(stack(batches))
    made = {**drawn, **labels.encode(logits(7, 6 * 30).reshape(6, 30, 7))}
    weight = sum(t.numel() * t.element_size() for t in made.values())
    assert weight == storage(labels, 10, classes=7, epochs=2, batch=30)
    for batch, again in zip(batches, unstack(made), strict=True):
        there = {k: v for k, v in vars(batch).items() if v is not None}
        assert all(torch.equal(v, getattr(again, k)) for k, v in there.items())
        assert set(there) == {k for k, v in vars(again).items() if v is not None}
        assert again.index.dtype == again.partner.dtype == torch.int64


def test_table_of_the_readme_is_computed():
    assert label_storage.table() in (ROOT / "README.md").read_text()
    assert storage(FORMATS[1], 10) < label_storage.FKD[10] / 40
    assert storage(FORMATS[1], 50) < label_storage.FKD[50] / 40
    for ipc, theirs in label_storage.FKD.items():  # and one epoch more would be too much
        assert storage(FORMATS[3], ipc, epochs=27) < theirs / 40
        assert storage(FORMATS[3], ipc, epochs=28) > theirs / 40
