"""Generators: classifier-free guidance, files, schedulers."""

import json
from importlib import resources

import pytest
import torch
from distill import tiny

from otdd.distill.codec import import_diffusers
from otdd.distill.data import load_data
from otdd.distill.fit import FitConfig, fit
from otdd.distill.generator import Generator, GeneratorError, load_generator

TINY = FitConfig(width=32, layers=1, steps=6, batch=8, checkpoint_every=2)


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Generator:
    made = fit(tiny.images(), TINY, tmp_path_factory.mktemp("g") / "toy.safetensors")
    torch.manual_seed(1)
    for parameter in made.transformer.parameters():  # blocks start as identity: make them differ
        parameter.copy_(0.1 * torch.randn_like(parameter))
    return made


def test_guidance_uses_the_null_class_of_this_many_classes(generator):
    x, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    assert generator.null_class == 3
    conditional, _ = generator.predict(x, 500, labels)
    free, _ = generator.predict(x, 500, torch.full_like(labels, 3))
    guided, rest = generator.predict(x, 500, labels, guidance_scale=4.0)
    assert rest is None
    assert not torch.allclose(conditional, free)
    torch.testing.assert_close(guided, free + 4 * (conditional - free), rtol=1e-4, atol=1e-5)


def test_learned_variances_stay_conditional():
    model = import_diffusers().DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=32, in_channels=2, out_channels=4, num_layers=1,
        sample_size=4, patch_size=2, num_embeds_ada_norm=2,
    )  # fmt: skip
    made = Generator(model.eval(), {"num_train_timesteps": 1000}, None, ["a", "b"], (1, 4, 4))
    x, labels = torch.randn(2, 2, 4, 4), torch.tensor([0, 1])
    with torch.no_grad():
        plain, variance = made.predict(x, 10, labels)
        _, same = made.predict(x, 10, labels, guidance_scale=2.0)
    assert plain.shape == variance.shape == x.shape
    torch.testing.assert_close(same, variance, rtol=1e-4, atol=1e-6)
    assert made.scheduler("ddpm", 5).config.variance_type == "learned_range"


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++"])
def test_schedulers(generator, name):
    scheduler = generator.scheduler(name, 7)
    assert len(scheduler.timesteps) == 7
    with pytest.raises(ValueError, match=r"steps must lie in 1\.\.1000, got 0"):
        generator.scheduler(name, 0)


def test_unknown_scheduler_and_classes(generator):
    with pytest.raises(ValueError, match="accepted: ddim, ddpm, dpm"):
        generator.scheduler("heun", 5)
    with pytest.raises(GeneratorError, match=r"'zebra'.*it knows c0, c1, c2"):
        generator.class_indices(["c1", "zebra"])
    assert generator.class_indices(["c2", "c0"]) == [2, 0]


def test_files_round_trip(generator, tmp_path):
    generator.save(tmp_path / "g.safetensors")
    again = Generator.load(tmp_path / "g.safetensors")
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    want, got = generator.predict(x, 3, labels)[0], again.predict(x, 3, labels)[0]
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)  # weights are kept in float16
    assert again.classes == generator.classes
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "g.safetensors").read_bytes()[:999])
    for name in ("cut.safetensors", "missing.safetensors"):
        with pytest.raises(GeneratorError, match=name):
            Generator.load(tmp_path / name)


def test_generators_that_do_not_fit_the_data(generator, tmp_path):
    generator.save(tmp_path / "g.safetensors")
    with pytest.raises(GeneratorError, match="classes missing"):
        load_generator(tmp_path / "g.safetensors", load_data("digits"))
    with pytest.raises(GeneratorError, match=r"no generator is shipped.*otdd fit"):
        load_generator(None, tiny.images())
    with pytest.raises(GeneratorError, match="class names"):
        Generator(generator.transformer, {}, generator.codec, ["one"], (1, 8, 8))


def test_the_shipped_generator_is_the_one_described():
    import hashlib

    folder = resources.files("otdd.distill") / "assets"
    about = json.loads((folder / "digits.json").read_text())
    content = (folder / "digits.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == about["sha256"]
    assert len(content) < 3e6
    made = load_generator(None, load_data("digits"))
    assert {k: made.info["fit"][k] for k in ("steps", "seed", "data")} == {
        "steps": 8000, "seed": 0, "data": "digits",
    }  # fmt: skip
    assert made.info["fit"]["fingerprint"] == load_data("digits").fingerprint
