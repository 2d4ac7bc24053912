"""Student networks: shapes, seeds, checkpoints, refusals."""

import pytest
import torch
from safetensors.torch import save_file

from otdd.distill.config import ConfigError
from otdd.distill.data import ImageData, LabeledImages
from otdd.distill.store import Store
from otdd.distill.students import (
    OWN,
    check_network,
    check_pretrained,
    import_timm,
    load_checkpoint,
    make_network,
)


def toy_data(size=8, channels=1, classes=3):
    images = torch.randint(0, 256, (12, channels, size, size), dtype=torch.uint8)
    labels = torch.arange(12) % classes
    part = LabeledImages(images, labels)
    return ImageData("toy", [f"c{k}" for k in range(classes)], part, part)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3), (20, 1)])
def test_own_networks_take_any_size(name, size, channels):
    data = toy_data(size, channels)
    network = make_network(name, data, seed=0)
    logits = network(torch.rand(2, channels, size, size))
    assert logits.shape == (2, 3)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_depth_grows_with_the_image():
    def depth(size):
        body = make_network("convnet", toy_data(size), seed=0).body
        return sum(isinstance(m, torch.nn.Conv2d) for m in body.modules())

    assert [depth(s) for s in (8, 16, 32, 64)] == [2, 2, 3, 4]


def test_seed_decides_the_weights_and_nothing_else_changes():
    data = toy_data()
    before = torch.random.get_rng_state()
    one, two, other = (make_network("convnet", data, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(one.body.head.weight, two.body.head.weight)
    assert not torch.equal(one.body.head.weight, other.body.head.weight)


def test_timm_by_name():
    network = make_network("resnet10t", toy_data(32, 3), seed=0)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 3)


def test_unknown_and_unfit_architectures():
    with pytest.raises(ConfigError, match=r"unknown architecture 'resnet1'.*timm name \(like"):
        check_network("resnet1", toy_data())
    with pytest.raises(ConfigError, match="cannot take images of 1x8x8"):
        check_network("vgg11", toy_data())


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_checkpoints(tmp_path, suffix, whole):
    source = make_network("convnet", toy_data(), seed=5)
    state = (source if whole else source.body).state_dict()
    file = tmp_path / f"net.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save({"state_dict": state}, file)
    loaded = load_checkpoint("convnet", file, toy_data())
    assert torch.equal(loaded.body.head.weight, source.body.head.weight)


def test_teacher_of_other_classes_is_refused(tmp_path):
    state, store = make_network("convnet", toy_data(), seed=5).state_dict(), Store(tmp_path)
    for name, classes in (("same", ["c0", "c1", "c2"]), ("turned", ["c2", "c1", "c0"])):
        about = {"arch": "convnet", "classes": classes}
        store.write_tensors(f"{name}.safetensors", state, about)
    load_checkpoint("convnet", tmp_path / "same.safetensors", toy_data())
    with pytest.raises(
        ConfigError, match=r"knows the classes 'c2', 'c1', 'c0'; toy has 'c0', 'c1'"
    ):
        load_checkpoint("convnet", tmp_path / "turned.safetensors", toy_data())


def test_pretrained_networks_are_checked_without_their_weights():
    with pytest.raises(ConfigError, match="timm:test_resnet knows 1000 classes, toy has 3"):
        check_pretrained("test_resnet", toy_data(32, 3))
    data = toy_data(32, 3, classes=1000)
    check_pretrained("test_resnet", data)
    with pytest.raises(
        ConfigError, match=r"timm:vit_tiny_patch16_224 cannot take images of 3x32x32: .*224"
    ):
        check_pretrained("vit_tiny_patch16_224", data)


def test_networks_without_logits_are_refused(monkeypatch):
    monkeypatch.setattr(import_timm(), "create_model", lambda *_, **__: torch.nn.Identity())
    with pytest.raises(ConfigError, match=r"resnet18 gives \(1, 1, 8, 8\) for an image; expected"):
        check_network("resnet18", toy_data())


def test_checkpoints_that_do_not_fit_or_hold_code(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="does not hold a convnet"):
        load_checkpoint("convnet", tmp_path / "x.safetensors", toy_data())
    broken = {**make_network("convnet", toy_data(), 0).body.state_dict()}
    broken["head.bias"] = torch.full((3,), torch.nan)
    save_file(broken, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="holds weights that are not finite"):
        load_checkpoint("convnet", tmp_path / "x.safetensors", toy_data())
    (tmp_path / "x.safetensors").write_bytes(b"no header of theirs")
    with pytest.raises(ConfigError, match=r"cannot read .*header"):
        load_checkpoint("convnet", tmp_path / "x.safetensors", toy_data())


@pytest.mark.parametrize("what", ["code", "nothing", "text"])
def test_files_that_torch_does_not_load_as_weights(tmp_path, what):
    """In one line without control characters, and without torch's advice to run the code."""
    path = tmp_path / "x.pt"
    path.write_bytes(b"" if what == "nothing" else b"some text")
    if what == "code":
        torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(ConfigError, match=r"cannot read .*x\.pt: expected safetensors") as caught:
        load_checkpoint("convnet", path, toy_data())
    assert str(caught.value).isprintable()
    assert "trust" not in str(caught.value)


@pytest.mark.parametrize("under", [None, "state_dict"])
def test_weights_of_distributed_data_parallel(tmp_path, under):
    network = make_network("convnet", toy_data(), 3)
    state = {f"module.{name}": tensor for name, tensor in network.body.state_dict().items()}
    torch.save({under: state} if under else state, tmp_path / "x.pt")
    loaded = load_checkpoint("convnet", tmp_path / "x.pt", toy_data())
    assert torch.equal(loaded.body.head.weight, network.body.head.weight)


def test_a_checkpoint_that_does_not_fit_is_told_what_it_has(tmp_path):
    torch.save({"net": make_network("convnet", toy_data(), 0).body.state_dict()}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=r'Missing key.*"features\.0\.weight".*Unexpected.*"net"'):
        load_checkpoint("convnet", tmp_path / "x.pt", toy_data())


@pytest.mark.parametrize(
    "held", [None, [1, 2], torch.zeros(3), {1: torch.zeros(1)}, {"model": "x"}]
)
def test_checkpoints_without_weights_by_name(tmp_path, held):
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=r"x\.pt holds no weights by name; expected .*state_dict"):
        load_checkpoint("convnet", tmp_path / "x.pt", toy_data())
