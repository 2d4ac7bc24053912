"""The README's examples of the ops run as they are printed, each by itself."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"

if not README.is_file():
    pytest.skip("not run from the sources", allow_module_level=True)

SECTION = re.search(r"^## Use the ops$(.*?)^## ", README.read_text(), re.MULTILINE | re.DOTALL)[1]


def example(word):
    blocks = re.findall(r"^```python\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if word in block]
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    return names


def test_ops():
    names = example("barycentric")
    assert names["x"].grad.shape == names["targets"].shape == (8, 50, 64)


def test_dataset_distance():
    names = example("DatasetDistance")
    assert names["x"].grad.abs().sum() > 0


def test_drop_ins_agree_with_the_originals():
    geomloss, ot = pytest.importorskip("geomloss"), pytest.importorskip("ot")
    names = example("SamplesLoss")
    x, y, a, b, M = (names[name] for name in ("x", "y", "a", "b", "M"))
    theirs = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.05, scaling=0.95)(x, y)
    assert names["loss"] == pytest.approx(theirs.item(), rel=0.02)
    assert names["plan"] == pytest.approx(ot.sinkhorn(a, b, M, reg=0.05), rel=1e-6)
