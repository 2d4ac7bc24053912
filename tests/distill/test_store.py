"""The store: identity, atomic writes, full disks, locks."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from otdd.distill.pipeline import run_stages
from otdd.distill.settings import resolve
from otdd.distill.store import LOCK, MANIFEST, TEMP, Store, StoreError
from otdd.distill.sums import SUMS

RUN = {"data": "digits", "ipc": 1, "window": (0.0, 1.0)}


def test_same_run_opens_again_and_another_is_refused(tmp_path):
    Store.open(tmp_path / "a", RUN)
    assert Store.open(tmp_path / "a", RUN).identity["ipc"] == 1
    with pytest.raises(StoreError, match=r"another run \(ipc: 1 there, 5 here\)"):
        Store.open(tmp_path / "a", {**RUN, "ipc": 5})


def test_foreign_folder_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(StoreError, match=r"no otdd output \(it holds 'thesis.tex'\)"):
        Store.open(tmp_path, RUN, lock=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(StoreError, match="is a file"):
        Store.open(tmp_path / "thesis.tex", RUN)


def test_tensors_json_and_meta_round_trip(tmp_path):
    store = Store.open(tmp_path, RUN)
    x = torch.arange(6.0).reshape(2, 3).t()
    store.write_tensors("a/b.safetensors", {"x": x}, meta={"k": [1, "é"]})
    assert torch.equal(store.read_tensors("a/b.safetensors")["x"], x)
    assert store.read_meta("a/b.safetensors") == {"k": [1, "é"]}
    store.write_json("m.json", {"b": 1, "a": 2})
    assert store.read_json("m.json") == {"b": 1, "a": 2}
    with pytest.raises(StoreError, match=r"none.json is missing"):
        store.read_json("none.json")


def test_damaged_file_is_named(tmp_path):
    store = Store.open(tmp_path, RUN)
    (tmp_path / "x.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(StoreError, match=r"x\.safetensors cannot be read"):
        store.read_tensors("x.safetensors")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_pngs_by_class_and_tensors(tmp_path, channels):
    store = Store.open(tmp_path, RUN)
    images = torch.randint(0, 256, (4, channels, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 0, 1, 1])
    for _ in range(2):
        store.write_images("otg", images, labels, latents=images.float())
    assert store.has_images("otg")
    assert torch.equal(store.read_images("otg")["images"], images)
    with Image.open(tmp_path / "sets/otg/images/00001/00000.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).reshape(8, 8, channels)
    assert torch.equal(pixels.permute(2, 0, 1), images[2])


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left while writing"),
        (errno.EDQUOT, "finished before is kept"),
        (errno.EROFS, "cannot write"),
    ],
)
def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch, code, words):
    store = Store.open(tmp_path, RUN)
    store.write_json("kept.json", 1)

    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(StoreError, match=words):
        store.write_json("kept.json", 2)
    with pytest.raises(StoreError, match=words):
        store.write_images("otg", images, torch.tensor([0]))
    files = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert files == [SUMS, "kept.json", MANIFEST]
    assert store.read_json("kept.json") == 1


def test_lock_refuses_a_second_process_and_heals(tmp_path):
    code = (
        "import sys, time; from otdd.distill.store import Store\n"
        f"s = Store.open({str(tmp_path)!r}, {RUN!r}, lock=True); print('held', flush=True)\n"
        "time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(StoreError, match="in use by another otdd process"):
        Store.open(tmp_path, RUN, lock=True)
    holder.kill()
    holder.wait()
    stale = tmp_path / "sets" / f"{TEMP}9-x"
    stale.mkdir(parents=True)
    (stale / "half.png").write_bytes(b"")
    with Store.open(tmp_path, RUN, lock=True):
        assert not stale.exists()
        assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize("file", ["config.json", "data.json", "metrics.json"])
def test_a_run_that_fails_as_it_opens_gives_the_lock_back(tmp_path, monkeypatch, file):
    out = tmp_path / "run"
    settings = {"sets": ["random"], "train": {"losses": ["ce"]}}
    config = resolve({"data": "digits", "ipc": 1, "out": str(out), **settings})
    write = Store.write_bytes

    def full(self, name, data):
        if name == file:
            raise OSError(errno.ENOSPC, "full")
        write(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_bytes", full)
        with pytest.raises(OSError, match="full"):
            run_stages(config, ("sample",))
    if file == "metrics.json":
        (out / file).write_text("{")
        with pytest.raises(StoreError, match=r"metrics\.json cannot be read"):
            run_stages(config, ("sample",))
        (out / file).unlink()
    run_stages(config, ("sample",))  # in the same process: the folder was "in use"
    assert (out / "data.json").exists()
