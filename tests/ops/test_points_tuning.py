"""Tile sizes that were measured, and how they are kept."""

import json

import pytest
import torch
from references import clouds, cost_oracle, sinkhorn_oracle

from otdd import backends
from otdd.ops import sinkhorn_points
from otdd.ops.points import tiles, tuning
from otdd.ops.points.reference import Clouds

GPU, FLOAT = torch.device("cuda", 0), torch.float32
LAST = dict(zip(tuning.SIZES, tuning.CANDIDATES[-1], strict=True))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("OTDD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "some GPU")
    tuning._kept.cache_clear()
    yield tmp_path / "cache"
    tuning._kept.cache_clear()


def test_the_fastest_is_kept_for_devices_of_the_same_name(folder):
    def timed(kind, sizes):
        if kind == "stored" and sizes != LAST:
            raise RuntimeError("out of resource")
        return 1.0 if sizes == LAST else 2.0

    assert tuning.chosen(GPU, FLOAT, "stored") == {}
    assert set(tuning.tune("some GPU", timed)) == set(tuning.kinds())
    tuning.tune("another", lambda kind, sizes: float(sizes == LAST))
    assert set(json.loads((folder / "tiles.json").read_text())) == {"some GPU", "another"}
    for kind in tuning.kinds():
        assert tuning.chosen(GPU, FLOAT, kind) == LAST
    assert tuning.chosen(GPU, torch.float64, "stored") == {}
    assert tuning.chosen(torch.device("cpu"), FLOAT, "stored") == {}
    assert tuning.chosen(GPU, FLOAT, "product ieee") == {}


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_what_is_measured_is_how_this_gpu_makes_costs(hip, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(backends, "INTERPRETED", False)
    seen = set()
    for kind, (N, D, precision) in tuning.kinds().items():
        plan = tiles.plan_of(1, N, N, D, 4, "sqeuclidean", precision)
        x, y, a, b = clouds(1, 5, 7, D, torch.float32)
        eps = torch.ones(1, dtype=torch.float64)
        p = Clouds(x, y, a, b, eps, eps, eps, None, None, None)
        made = tiles.tiles_of(p, "sqeuclidean", precision, plan.cost)
        if plan.keep == "all":
            made = made.stored(torch.zeros(1, 5, 7))
        assert made.kind == kind
        seen.add(made.precision)
    if hip:  # float32 is multiplied as it is, whatever is allowed
        assert seen == {"", "ieee", "bf16"}


@pytest.mark.parametrize("text", ["{", "[]", '{"some GPU": {"stored": {"BLOCK_N": 64}}}', ""])
def test_a_damaged_file_is_told_and_left_out(folder, text):
    folder.mkdir()
    (folder / "tiles.json").write_text(text)
    with pytest.warns(UserWarning, match=r"tiles\.json cannot be read and is left out"):
        assert tuning.chosen(GPU, FLOAT, "stored") == {}


@pytest.mark.parametrize("candidate", tuning.CANDIDATES)
def test_every_size_gives_the_same(candidate, monkeypatch):
    x, y, a, b = clouds(1, 70, 150, 20, torch.float32)
    sizes = dict(zip(tuning.SIZES, candidate, strict=True))
    monkeypatch.setattr(tiles, "RESIDENT", 0)
    if candidate[0] == 32:
        monkeypatch.setattr(tiles, "REMADE", dict.fromkeys(tiles.REMADE, 0))
    options = {"eps": 2.0, "max_iter": 2}
    with tuning.forced(sizes):
        r = sinkhorn_points(x, y, a, b, **options, backend="triton")
    C = cost_oracle(x.double(), y.double(), "sqeuclidean")
    expected = sinkhorn_oracle(C, a.double(), b.double(), **options)
    torch.testing.assert_close(r.f.double(), expected["f"], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(r.cost.double(), expected["cost"], rtol=2e-5, atol=2e-5)
