"""Encoded data sets: the latents of the images, shard by shard, checked, and used by sampling."""

import os
import tracemalloc

import pytest
import torch
from distill.test_data import folder, picture
from distill.tiny import autoencoder

from otdd import cli
from otdd.distill.codec import AutoencoderCodec, PixelCodec
from otdd.distill.config import ConfigError
from otdd.distill.data import DataError, load_data
from otdd.distill.encode import EncodeConfig, encode
from otdd.distill.fit import FitConfig, fit
from otdd.distill.inputs import pictures
from otdd.distill.latents import Latents
from otdd.distill.modes import kmeans_centres
from otdd.distill.store import Store, StoreError
from otdd.distill.stream import Stream, open_stream
from otdd.terminal import Pace

SMALL = EncodeConfig(shard=7, batch=3, support=2)


@pytest.fixture
def root(tmp_path):
    made = folder(tmp_path / "data", count=9)
    picture(made / "train" / "b" / "wide.png", 5, size=(12, 8), mode="RGB")
    return made


def stream(root):
    return open_stream(root, resolution=8)


def listing(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize("command", ["encode", "fit-surrogate", "sample"])
def test_folders_of_other_commands_are_refused(tmp_path, capsys, command, dry):
    data = open_stream("digits")
    encode(data, PixelCodec(), out=tmp_path / "latents")
    with Store.open(tmp_path / "run", {"ipc": 1, "data_sha256": load_data("digits").fingerprint}):
        pass
    made = tmp_path / ("latents" if command == "sample" else "run")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("dear")
    before = listing(made)
    more = ["--ipc", "1"] if command == "sample" else []
    for out in (made, tmp_path / "foreign"):
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--data", "digits", *more, "--out", str(out), *dry])
        assert stop.value.code == 2
        err = capsys.readouterr().err
        said = "is of another otdd command" if out == made else "is not empty and no otdd output"
        assert said in err
        assert err.count("\n") == 1
    assert listing(made) == before


def test_memory_of_many_images_is_that_of_their_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "header", lambda path: (1, 8, 8))
    for name in ("a", "b"):
        picture(tmp_path / name / "0.png", 1)
        for n in range(1, 10_000):
            os.link(tmp_path / name / "0.png", tmp_path / name / f"{n}.png")
    tracemalloc.start()
    made = open_stream(tmp_path, resolution=8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(made) == 16_000
    assert peak / 20_000 < 1200  # 2100 bytes when all of them waited for the threads at once


@pytest.mark.parametrize("split", [True, False])
def test_a_stream_is_the_training_part_of_the_data(root, split):
    spec = root if split else root / "train"
    data, seen = load_data(spec, resolution=8, seed=3), open_stream(spec, resolution=8, seed=3)
    assert (seen.name, seen.classes, seen.image_shape) == (
        data.name, data.classes, data.image_shape,
    )  # fmt: skip
    assert torch.equal(seen.labels, data.train.labels)
    parts = [seen.read(k, min(k + 4, len(seen))) for k in range(0, len(seen), 4)]
    assert torch.equal(torch.cat(parts), data.train.images)


@pytest.mark.parametrize("codec", [PixelCodec(), AutoencoderCodec(autoencoder())])
def test_latents_and_statistics_are_those_of_the_images(root, tmp_path, codec):
    data = load_data(root, resolution=8)
    made = encode(stream(root), codec, SMALL, tmp_path / "out")
    want = codec.encode(data.train.images).half().float()
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made.rows(order), want[order], rtol=1e-2, atol=2e-3)
    assert made.latent_shape == want.shape[1:]
    again = Latents(tmp_path / "out")
    again.check(data, codec)
    assert again.digest == made.digest
    for label in range(2):
        own = again.rows((data.train.labels == label).nonzero()[:, 0])
        kept = again.statistics(label)
        torch.testing.assert_close(kept["mean"], own.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept["std"], own.std(0, correction=0), rtol=1e-4, atol=1e-4)
        modes = again.modes(label, 2, 0)
        torch.testing.assert_close(modes, kmeans_centres(own, 2, 0))
        assert again.modes(label, 3, 0) is None


def test_memory_is_a_batch_of_images_and_a_shard_of_latents(root, tmp_path, monkeypatch):
    sizes = []
    read = Stream.read

    def watched(self, start, stop):
        sizes.append(stop - start)
        return read(self, start, stop)

    monkeypatch.setattr(Stream, "read", watched)
    encode(stream(root), PixelCodec(), SMALL, tmp_path / "out")
    assert max(sizes) == 3
    assert sum(sizes) == 19 + (19 + 18)  # once to encode, once with the test images for a hash
    names = [p.name for p in sorted((tmp_path / "out").glob("latents-*"))]
    assert names == [f"latents-0000{k}.safetensors" for k in range(3)]


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("text", "at"), [("encode", 3), ("encode", 14), ("statistics", 1), ("check", 20)]
)
def test_interrupted_encoding_ends_with_the_same_bytes(root, tmp_path, text, at):
    def contents(name):
        files = (p for p in (tmp_path / name).rglob("*.*") if p.is_file())
        return {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in files}

    def stop(what, done, _):
        if (what, done >= at) == (text, True):
            raise Stop

    encode(stream(root), PixelCodec(), SMALL, tmp_path / "whole")
    with pytest.raises(Stop):
        encode(stream(root), PixelCodec(), SMALL, tmp_path / "cut", progress=stop)
    with pytest.raises(ConfigError, match="no finished latents; run `otdd encode`"):
        Latents(tmp_path / "cut")
    seen = []
    encode(stream(root), PixelCodec(), SMALL, tmp_path / "cut", progress=lambda *s: seen.append(s))
    finished = {3: 0, 14: 7, 1: 19, 20: 19}[at]
    assert seen[0] == ("encode", finished, 19)  # at 14 the second shard was not yet written
    assert contents("whole") == contents("cut")


def test_only_the_shard_of_a_changed_file_is_made_again(root, tmp_path):
    first = encode(stream(root), PixelCodec(), SMALL, tmp_path / "out").digest
    kept = tmp_path / "out" / "latents-00000.safetensors"
    before = kept.stat().st_mtime_ns
    picture(root / "train" / "b" / "8.png", 99, size=(16, 16))
    made = encode(stream(root), PixelCodec(), SMALL, tmp_path / "out")
    assert kept.stat().st_mtime_ns == before
    assert made.digest != first
    made.check(load_data(root, resolution=8), PixelCodec())


def test_latents_of_something_else_are_refused(root, tmp_path):
    made = encode(stream(root), PixelCodec(), SMALL, tmp_path / "out")
    data = load_data(root, resolution=8)
    with pytest.raises(ConfigError, match="encoded by another codec"):
        made.check(data, AutoencoderCodec(autoencoder()))
    with pytest.raises(ConfigError, match=r"images of \(3, 8, 8\); the data has 2, \(3, 4, 4\)"):
        made.check(load_data(root, resolution=4), PixelCodec())
    with pytest.raises(StoreError, match="another run"):
        encode(stream(root), PixelCodec(), EncodeConfig(shard=8), tmp_path / "out")
    picture(root / "train" / "a" / "3.png", 99)
    with pytest.raises(ConfigError, match=r"from other images \(among 0 to 6\)"):
        made.check(load_data(root, resolution=8), PixelCodec())
    (root / "train" / "a" / "3.png").unlink()
    with pytest.raises(ConfigError, match="from 19 training images, not these 18"):
        made.check(load_data(root, resolution=8), PixelCodec())


def test_damaged_shards_are_found_when_they_are_touched(root, tmp_path):
    encode(stream(root), PixelCodec(), SMALL, tmp_path / "out")
    path = tmp_path / "out" / "latents-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    made = Latents(tmp_path / "out")
    made.rows(torch.tensor([0, 6]))
    with pytest.raises(StoreError, match=r"latents-00001.safetensors is not what was written"):
        made.rows(torch.tensor([0, 7]))


def test_what_cannot_be_read_is_named_before_any_work(root, tmp_path, monkeypatch):
    (root / "train" / "a" / "broken.png").write_bytes(b"no image")
    (root / "val" / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"(?s)broken.png: unreadable.*gone.png: link to a file"):
        stream(root)
    with pytest.raises(DataError, match="images of 2 sizes"):
        open_stream(root)
    monkeypatch.undo()
    (root / "train" / "a" / "broken.png").unlink()
    (root / "val" / "b" / "gone.png").unlink()
    cut = root / "train" / "a" / "0.png"
    cut.write_bytes(cut.read_bytes()[:60])  # its header is sound
    with pytest.raises(DataError, match=r"0.png: unreadable image"):
        encode(stream(root), PixelCodec(), SMALL, tmp_path / "out")


def test_infinite_latents_are_not_written(root, tmp_path, monkeypatch):
    monkeypatch.setattr(PixelCodec, "encode", lambda _, images: 1e6 * images.float())
    with pytest.raises(StoreError, match="images 0 to 6 leave the half-precision range"):
        encode(stream(root), PixelCodec(), SMALL, tmp_path / "out")


@pytest.mark.parametrize("key", ["shard", "batch", "support", "seed"])
def test_bad_settings(key):
    with pytest.raises(ConfigError, match=f"{key}: -1 is not accepted"):
        EncodeConfig(**{key: -1})


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    return end.value.code or 0


def test_commands_encode_and_sample_with_latents(tmp_path, capsys, monkeypatch):
    out, latents = tmp_path / "o", tmp_path / "latents"
    assert call("encode", "--data", "digits", "--out", latents, "--support", "2") == 0
    printed = capsys.readouterr()
    assert "1297 latents of 1x8x8" in printed.out
    assert "encode: 1297 of 1297 images (100.0 %), " in printed.err
    assert " images/s" in printed.err
    sample = ["sample", "--data", "digits", "--ipc", "2", "--out", out, "--sets", "otg"]
    sample += ["--sample.steps", "2", "--sample.modes.strength", "0.5", "--latents"]
    monkeypatch.setattr(PixelCodec, "encode", lambda *_: pytest.fail("images were encoded again"))
    assert call(*sample, latents) == 0
    assert (out / "sets/otg/images.safetensors").is_file()
    monkeypatch.undo()
    assert call("encode", "--data", "digits", "--out", tmp_path / "other", "--shard", "99") == 0
    assert call(*sample, tmp_path / "other") == 2
    assert "latents_sha256" in capsys.readouterr().err
    assert call(*sample, tmp_path / "none") == 2
    assert "none holds no finished latents; run `otdd encode`" in capsys.readouterr().err


@pytest.fixture
def encoded(root, tmp_path):
    """An image folder with its latents and a generator for it."""
    data = load_data(root, resolution=8)
    fit(data, FitConfig(width=32, layers=1, steps=2, batch=4), tmp_path / "g.safetensors")
    encode(stream(root), PixelCodec(), SMALL, tmp_path / "latents")
    flags = ["--data", root, "--resolution", "8", "--ipc", "2", "--quiet"]
    flags += ["--generator", tmp_path / "g.safetensors", "--sample.steps", "2"]
    return [*flags, "--latents", tmp_path / "latents", "--sets", "otg", "unguided"]


def test_sampling_leaves_the_images_of_an_encoded_folder_alone(encoded, tmp_path, monkeypatch):
    for name in ("decode", "header"):
        opened = f"otdd.distill.inputs.pictures.{name}"
        monkeypatch.setattr(opened, lambda *_: pytest.fail("an image was opened"))
    assert call("sample", *encoded, "--out", tmp_path / "lazy") == 0
    monkeypatch.undo()
    images = "sets/otg/images.safetensors"
    assert call("evaluate", "--out", tmp_path / "lazy", "--quiet") == 0  # it is the same run
    epochs = ["--train.epochs", "1", "--relabel.teacher-epochs", "1", "--seeds", "1"]
    assert call("run", *encoded, *epochs, "--out", tmp_path / "whole") == 0
    assert (tmp_path / "lazy" / images).read_bytes() == (tmp_path / "whole" / images).read_bytes()


def test_images_of_an_encoded_folder_are_read_where_they_are_wanted(encoded, root, tmp_path):
    latents = Latents(tmp_path / "latents")
    streamed = latents.data(root, resolution=8, seed=0, ipc=1)
    held = load_data(root, resolution=8)
    assert (streamed.mean, streamed.std, streamed.fingerprint) == (
        held.mean, held.std, held.fingerprint,
    )  # fmt: skip
    for part, want in ((streamed.train, held.train), (streamed.test, held.test)):
        assert torch.equal(part.of_class(1), want.of_class(1))
        assert torch.equal(part.images[torch.tensor([5, 2])], want.images[[5, 2]])
        assert torch.equal(part.images[3:6], want.images[3:6])
    latents.check(streamed, PixelCodec())


def test_an_encoded_folder_that_changed_is_refused(encoded, root, tmp_path, capsys):
    latents, wanted = Latents(tmp_path / "latents"), {"resolution": 8, "seed": 0, "ipc": 1}
    with pytest.raises(ConfigError, match="was encoded at resolution 8, not 4"):
        latents.data(root, **{**wanted, "resolution": 4})
    with pytest.raises(DataError, match="ipc=10 asks for more"):
        latents.data(root, **{**wanted, "ipc": 10})
    picture(root / "val" / "a" / "0.png", 3, size=(64, 64))
    with pytest.raises(ConfigError, match="was encoded beside other test images"):
        latents.data(root, **wanted)
    picture(root / "train" / "a" / "0.png", 3, size=(64, 64))
    assert call("sample", *encoded, "--out", tmp_path / "o") == 2
    assert "was encoded from other images (among 0 to 6)" in capsys.readouterr().err
    picture(root / "train" / "a" / "new.png", 3)
    with pytest.raises(ConfigError, match="from other classes or numbers of images"):
        latents.data(root, **wanted)


def test_pace_tells_rate_and_time_left(capsys, monkeypatch):
    clock = iter([0.0, 5.0, 20.0, 120.0])
    monkeypatch.setattr("otdd.terminal.time.perf_counter", lambda: next(clock))
    pace = Pace({"encode": "images"})
    for done in (1000, 1500, 3000, 13000):
        pace("encode", done, 1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "encode: 1000 of 1000000 images (0.1 %)",
        "encode: 3000 of 1000000 images (0.3 %), 100.0 images/s, 2 h 46 min left",
        "encode: 13000 of 1000000 images (1.3 %), 100.0 images/s, 2 h 44 min left",
    ]
