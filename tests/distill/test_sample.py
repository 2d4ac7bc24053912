"""Guided sampling and the baselines: exact resume, independence of grouping, every combination."""

import copy
import dataclasses

import pytest
import torch

from otdd.distill import sample as stage
from otdd.distill.baselines import BASELINES, baselines
from otdd.distill.codec import PixelCodec
from otdd.distill.config import PRESETS, ConfigError, GuidanceConfig, RunConfig, SampleConfig
from otdd.distill.data import DataError, ImageData, LabeledImages
from otdd.distill.evaluate import transport_cost
from otdd.distill.fit import FitConfig, fit
from otdd.distill.generator import Generator, GeneratorError
from otdd.distill.guidance import OTGuidance
from otdd.distill.relabel import Teacher, see
from otdd.distill.settings import from_dict, merge, resolve
from otdd.distill.store import Store
from otdd.distill.surrogate import SurrogateConfig, fit_surrogate
from otdd.distill.update import judged_by_teachers

CLASSES, COUNT = 5, 12


@pytest.fixture(scope="module")
def data() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(CLASSES, 1, 1, 8, 8, generator=generator)
    noise = torch.rand(CLASSES, COUNT, 1, 8, 8, generator=generator)
    images = ((0.7 * base + 0.3 * noise) * 255).to(torch.uint8).flatten(0, 1)
    part = LabeledImages(images, torch.arange(CLASSES).repeat_interleave(COUNT))
    return ImageData("toy", [f"c{k}" for k in range(CLASSES)], part, part)


@pytest.fixture(scope="module")
def generator(data, tmp_path_factory) -> Generator:
    config = FitConfig(width=32, layers=1, steps=40, batch=16)
    return fit(data, config, tmp_path_factory.mktemp("g") / "toy.safetensors")


def settings(ipc: int = 2, seed: int = 0, guidance=None, **kwargs) -> RunConfig:
    kwargs = {"steps": 4, "batch_classes": 2, "starts": 1} | kwargs
    made = SampleConfig(guidance=GuidanceConfig(**(guidance or {})), **kwargs)
    return RunConfig(data="toy", ipc=ipc, out="unused", seed=seed, sample=made)


def run(folder, data, generator, config, name="otg") -> dict[str, torch.Tensor]:
    store = Store(folder)
    stage.sample(store, data, generator, config, set_name=name)
    return store.read_images(name)


@pytest.mark.parametrize("target", ["z_t", "x0", "through", "q_sample"])
@pytest.mark.parametrize("order", ["joint", "sequential"])
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm++"])
def test_every_target_order_and_scheduler(tmp_path, data, generator, target, order, scheduler):
    config = settings(order=order, scheduler=scheduler, guidance={"target": target})
    guided = run(tmp_path / "a", data, generator, config)
    free = run(tmp_path / "b", data, generator, config, "unguided")
    assert guided["images"].shape == (CLASSES * 2, 1, 8, 8)
    assert guided["labels"].tolist() == [k for k in range(CLASSES) for _ in range(2)]
    assert torch.isfinite(guided["latents"]).all()
    assert not torch.equal(guided["latents"], free["latents"])


def test_a_batch_found_once_is_kept_for_the_folder(tmp_path, data, generator, monkeypatch):
    calls = []
    found = lambda *given, grad: calls.append((given[2], grad)) or 3  # noqa: E731
    monkeypatch.setattr("otdd.distill.capacity.find_batch", found)
    auto = settings(ipc=3, batch_images="auto", guidance={"target": "through"})
    three = settings(ipc=3, batch_images=3, guidance={"target": "through"})
    made = run(tmp_path / "auto", data, generator, auto)
    assert torch.equal(made["latents"], run(tmp_path / "3", data, generator, three)["latents"])
    assert calls == [(2 * 3, True)]  # two classes at once
    assert Store(tmp_path / "auto").read_json(stage.BATCH) == {"batch_images": 3}
    run(tmp_path / "auto", data, generator, auto, "unguided")
    assert len(calls) == 1
    plain = settings(ipc=3, batch_images="auto")
    run(tmp_path / "plain", data, generator, plain)
    assert calls[1:] == [(6, False)]
    monkeypatch.undo()
    real = run(tmp_path / "real", data, generator, plain)
    torch.testing.assert_close(
        real["latents"], run(tmp_path / "whole", data, generator, settings(ipc=3))["latents"]
    )


@pytest.mark.parametrize("order", ["joint", "sequential"])
def test_guidance_on_x0_lowers_the_transport_cost(tmp_path, data, generator, order):
    config = settings(ipc=3, steps=10, order=order)
    costs = {}
    for name in ("otg", "unguided"):
        made = run(tmp_path / name, data, generator, config, name)
        costs[name] = transport_cost(made["images"], made["labels"], data, PixelCodec())
    assert costs["otg"] < 0.65 * costs["unguided"]


@pytest.fixture(scope="module")
def surrogate(data, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("surrogate")
    fit_surrogate(data, SurrogateConfig(arch="convnet", epochs=2, checkpoints=2), folder)
    return str(folder)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_run_and_each_term_can_be_switched_off(tmp_path, data, generator, surrogate, name):
    base = {"data": "toy", "ipc": 2, "out": "x", "preset": name}
    fast = {"steps": 8, "influence": {"surrogate": surrogate}}
    terms = ("guidance", "influence", "diversity", "modes")
    config = resolve(merge(base, {"sample": fast}))
    on = [term for term in terms if getattr(config.sample, term).strength > 0]
    made = {"all": run(tmp_path / "all", data, generator, config)["latents"]}
    for off in on:
        fewer = resolve(merge(base, {"sample": {**fast, off: {"strength": 0.0}}}))
        made[off] = run(tmp_path / off, data, generator, fewer)["latents"]
    made["free"] = run(tmp_path / "free", data, generator, config, "unguided")["latents"]
    assert all(torch.isfinite(latents).all() for latents in made.values())
    for off in on:
        assert not torch.equal(made[off], made["all"])
    close = torch.allclose(made["all"], made["free"], atol=1e-5)
    assert close == (not on)
    if len(on) == 1:
        torch.testing.assert_close(made[on[0]], made["free"], rtol=1e-4, atol=1e-4)


def test_modes_bring_images_near_to_centroids(tmp_path, data, generator):
    base = {"data": "toy", "ipc": 2, "out": "x", "sample": {"steps": 6, "starts": 1}}
    off = {"guidance": {"strength": 0.0}, "modes": {"strength": 0.8, "window": [0.0, 1.0]}}
    made = run(tmp_path / "a", data, generator, resolve(merge(base, {"sample": off})))["latents"]
    free = run(tmp_path / "b", data, generator, resolve(base), "unguided")["latents"]
    baselines(Store(tmp_path / "c"), data, settings(ipc=2), "kmeans")
    centres = Store(tmp_path / "c").read_images("kmeans")["latents"]
    near, far = ((x - centres).flatten(1).norm(dim=1).mean() for x in (made, free))
    assert near < 0.3 * far


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 4, 5, 9])
@pytest.mark.parametrize("order", ["joint", "sequential"])
def test_interrupted_sampling_ends_with_the_same_bytes(tmp_path, data, generator, at, order):
    config = settings(order=order, scheduler="ddpm", starts=2)
    run(tmp_path / "whole", data, generator, config)
    store = Store(tmp_path / "cut")

    def stop(_: str, done: int, __: int) -> None:
        if done == at:
            raise Stop

    with pytest.raises(Stop):
        stage.sample(store, data, generator, config, progress=stop)
    run(tmp_path / "cut", data, generator, config)
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.*"))
    assert files == sorted(p.relative_to(tmp_path / "cut") for p in (tmp_path / "cut").rglob("*.*"))
    for name in files:
        if (tmp_path / "whole" / name).is_file():
            assert (tmp_path / "whole" / name).read_bytes() == (
                tmp_path / "cut" / name
            ).read_bytes()


def test_an_image_depends_on_seed_class_and_index_alone(tmp_path, data, generator):
    config = settings(ipc=2)
    few = run(tmp_path / "a", data, generator, config, "unguided")["latents"]
    more = run(tmp_path / "b", data, generator, settings(ipc=3, batch_classes=5), "unguided")
    other = run(tmp_path / "c", data, generator, settings(seed=1), "unguided")["latents"]
    kept = more["latents"].view(CLASSES, 3, *few.shape[1:])[:, :2].flatten(0, 1)
    torch.testing.assert_close(kept, few, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(few, other, atol=1e-2)


@pytest.mark.parametrize("starts", [1, 3])
def test_progress_counts_to_its_total(tmp_path, data, generator, starts):
    seen = []
    config = settings(starts=starts)
    stage.sample(Store(tmp_path), data, generator, config, progress=lambda *s: seen.append(s))
    total = 3 * 4 * starts  # groups of steps
    assert [done for _, done, _ in seen] == list(range(1, total + 1))
    assert {of for *_, of in seen} == {total}


def test_the_best_of_several_starts_is_kept_for_each_class(tmp_path, data, generator):
    costs = []
    for starts in (1, 2, 5):
        made = run(tmp_path / str(starts), data, generator, settings(ipc=3, starts=starts))
        guidance = OTGuidance(GuidanceConfig())
        guidance.set_reference(PixelCodec().encode(data.train.images), data.train.labels)
        costs.append(guidance.transport_cost(made["latents"], made["labels"]))
    assert (costs[1] <= costs[0] + 1e-5).all()
    assert (costs[2] <= costs[1] + 1e-5).all()
    assert (costs[2] < costs[0]).any()


def test_several_starts_are_compared_by_what_teachers_see(tmp_path, data, generator):
    torch.manual_seed(0)
    networks = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5)) for _ in range(2)]
    teachers = [Teacher("own", network.eval(), "digest", 0.0) for network in networks]
    guidance = OTGuidance(GuidanceConfig())
    guidance.set_reference(see(teachers, data.train.images), data.train.labels)

    def cost(made):
        return guidance.transport_cost(see(teachers, made["images"]), made["labels"])

    each = []
    for seed in (3, 4):
        config = settings(ipc=3, seed=seed, starts=3)
        folders = [tmp_path / f"{seed}-{name}" for name in ("latents", "logits")]
        by_latents = run(folders[0], data, generator, config)
        stage.sample(Store(folders[1]), data, generator, config, teachers=teachers)
        made = Store(folders[1]).read_images("otg")
        each.append((cost(made), cost(by_latents)))
    mine, theirs = (torch.cat(parts) for parts in zip(*each, strict=True))
    assert (mine <= theirs + 1e-3 * theirs).all()
    assert (mine < 0.99 * theirs).any()


def test_who_compares_starts():
    def by_teachers(losses=("kl",), sets=("otg",), latents=None, **sample):
        told = {"sample": sample, "train": {"losses": losses}, "sets": sets, "latents": latents}
        return judged_by_teachers(
            from_dict(RunConfig, {"data": "toy", "ipc": 1, "out": "x", **told})
        )

    assert by_teachers()
    assert by_teachers(losses=("ce",), judge="teachers")
    assert not by_teachers(losses=("ce",))
    assert not by_teachers(judge="latents")
    assert not by_teachers(starts=1)
    assert not by_teachers(starts=1, judge="teachers")
    assert not by_teachers(order="sequential")
    assert not by_teachers(sets=("unguided",))
    assert not by_teachers(latents="encoded")
    with pytest.raises(ConfigError, match=r"sample\.judge: 'teachers' is not accepted"):
        by_teachers(latents="encoded", judge="teachers")


@pytest.mark.parametrize("name", ["otg", "unguided"])
def test_predictions_that_are_no_numbers_are_refused(tmp_path, data, generator, name):
    broken = dataclasses.replace(generator, transformer=copy.deepcopy(generator.transformer))
    next(broken.transformer.parameters()).data.fill_(torch.nan)
    with pytest.raises(GeneratorError, match=r"NaN or infinity .* sample.precision float32; exp"):
        run(tmp_path, data, broken, settings(), name)
    assert not Store(tmp_path).has_images(name)


def test_class_missing_from_the_generator(tmp_path, data, generator):
    other = dataclasses.replace(data, classes=[*data.classes[:4], "zebra"])
    with pytest.raises(GeneratorError, match="zebra"):
        stage.sample(Store(tmp_path), other, generator, settings())
    with pytest.raises(ValueError, match="accepted: otg, unguided"):
        stage.sample(Store(tmp_path), data, generator, settings(), set_name="random")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(tmp_path, data, name):
    made = []
    for folder, seed in (("a", 0), ("b", 0)):
        store = Store(tmp_path / folder)
        baselines(store, data, settings(ipc=3, seed=seed), name)
        made.append(store.read_images(name))
    assert torch.equal(made[0]["images"], made[1]["images"])
    images = made[0]["images"].view(CLASSES, 3, 1, 8, 8)
    if name != "kmeans":  # distinct real images of their own class
        for k in range(CLASSES):
            real = {image.numpy().tobytes() for image in data.train.of_class(k)}
            chosen = {image.numpy().tobytes() for image in images[k]}
            assert len(chosen) == 3
            assert chosen <= real


def test_one_centroid_is_the_mean(tmp_path, data):
    store = Store(tmp_path)
    baselines(store, data, settings(ipc=1), "kmeans")
    mean = torch.stack([data.train.of_class(k).float().mean(0) for k in range(CLASSES)])
    seen = store.read_images("kmeans")["images"].float()
    torch.testing.assert_close(seen, mean, rtol=0, atol=0.51)


def test_baselines_refuse_what_cannot_be(tmp_path, data):
    with pytest.raises(DataError, match="ipc=13"):
        baselines(Store(tmp_path), data, settings(ipc=13), "random")
    with pytest.raises(ValueError, match="accepted: random, kmeans, kmeans-real"):
        baselines(Store(tmp_path), data, settings(), "otg")
