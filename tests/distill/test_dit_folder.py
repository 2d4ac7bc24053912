"""A DiT saved by diffusers, from Python and from the command line."""

import json
import shutil

import pytest
import torch
from distill.test_data import picture
from distill.tiny import dit_pipeline
from safetensors.torch import load_file

from otdd import cli
from otdd.distill import GuidanceConfig, OTDiTPipeline, OTGuidance
from otdd.distill.codec import import_diffusers
from otdd.distill.data import load_data
from otdd.distill.generator import Generator, GeneratorError, load_generator
from otdd.distill.terms import rng

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("dit")
    dit_pipeline().save_pretrained(made / "dit")
    for part in ("train", "val"):
        for k, name in enumerate(reversed(NAMES)):
            for n in range(4):
                picture(made / "data" / part / name / f"{n}.png", 10 * k + n, mode="RGB")
    return made


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    return end.value.code or 0


def command(root, out, *more):
    base = ["sample", "--data", root / "data", "--ipc", "2", "--out", out, "--quiet"]
    return [*base, "--generator", root / "dit", "--sample.steps", "3", *more]


def test_names_that_diffusers_lost_are_asked_for(root, tmp_path, capsys):
    assert call(*command(root, tmp_path / "o")) == 2
    assert "saved without names (diffusers loses them): put a list" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    (root / "dit/classes.json").write_text('["one"]')
    with pytest.raises(GeneratorError, match="expected a list of 3 names"):
        Generator.load(root / "dit")
    (root / "dit/classes.json").unlink()


@pytest.mark.parametrize("how", [{"safe_serialization": False}, {"variant": "fp16"}])
def test_other_files_of_weights_are_refused_with_the_way_out(root, tmp_path, capfd, how):
    dit_pipeline().save_pretrained(tmp_path / "other", **how)
    (tmp_path / "other" / "classes.json").write_text(json.dumps(NAMES))
    other = ["--resolution", "8", "--generator", tmp_path / "other"]
    assert call(*command(root, tmp_path / "run", *other)) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "transformer has no diffusion_pytorch_model.safetensors; it is in what diffusers" in err
    variant = {key: value for key, value in how.items() if key == "variant"}
    pipe = import_diffusers().DiTPipeline.from_pretrained(tmp_path / "other", **variant)
    pipe.save_pretrained(tmp_path / "anew", max_shard_size="20KB")  # as told, here in parts
    assert len(list((tmp_path / "anew" / "transformer").glob("*.safetensors"))) > 1
    assert (
        Generator.load(tmp_path / "anew").latent_shape == Generator.load(root / "dit").latent_shape
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("EDMEulerScheduler", {}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),
    ],
)
def test_models_of_other_noise_are_not_sampled_as_ddpm(root, tmp_path, name, settings):
    copy = shutil.copytree(root / "dit", tmp_path / "dit")
    getattr(import_diffusers(), name)(**settings).save_pretrained(copy / "scheduler")
    with pytest.raises(GeneratorError, match=f"its scheduler is {name}, whose noise is no schedul"):
        Generator.load(copy)


def test_a_noise_schedule_that_cannot_be_guided_is_refused_before_any_work(root, tmp_path, capsys):
    copy = shutil.copytree(root / "dit", tmp_path / "dit")
    (copy / "classes.json").write_text(json.dumps(NAMES))
    file = copy / "scheduler/scheduler_config.json"
    changed = {**json.loads(file.read_text()), "rescale_betas_zero_snr": True}
    file.write_text(json.dumps(changed | {"_use_default_values": []}))
    assert call(*command(root, tmp_path / "o", "--generator", copy)) == 2
    assert "generator: scheduler: rescale_betas_zero_snr with" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_inputs_of_a_run_are_found_from_any_folder(root, tmp_path, monkeypatch):
    shutil.copytree(root / "dit", tmp_path / "dit")
    (tmp_path / "dit/classes.json").write_text(json.dumps(NAMES))
    monkeypatch.chdir(tmp_path)
    encode = ["encode", "--data", root / "data", "--generator", "dit", "--out", "lat", "--quiet"]
    assert call(*encode) == 0
    assert call(*command(root, "run", "--generator", "dit", "--latents", "lat")) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for sets in ("otg", "unguided", "random"):  # and sets that no latents decide may be added
        assert call("sample", "--out", "../run", "--sets", sets, "--quiet") == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["generator"] == str(tmp_path.resolve() / "dit")
    assert config["latents"] == str(tmp_path.resolve() / "lat")


def test_command_and_pipeline_make_the_same_images(root, tmp_path):
    (root / "dit/classes.json").write_text(json.dumps(NAMES))
    assert call(*command(root, tmp_path, "--sets", "otg", "unguided", "--sample.starts", "1")) == 0
    made = {
        name: load_file(tmp_path / f"sets/{name}/images.safetensors")
        for name in ("otg", "unguided")
    }
    assert made["otg"]["images"].shape == (6, 3, 8, 8)

    data = load_data(root / "data")
    generator = load_generator(root / "dit", data)
    pipe = OTDiTPipeline.from_pretrained(root / "dit")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = generator.scheduler("ddim", 3)
    guidance = OTGuidance(GuidanceConfig())
    guidance.set_reference(generator.codec.encode(data.train.images), data.train.labels)
    for name, terms in (("otg", guidance), ("unguided", None)):
        latents = pipe(
            [0, 0, 1, 1, 2, 2],
            guidance_scale=2.0,
            generator=[rng(0, "image", c, n) for c in NAMES for n in range(2)],
            num_inference_steps=3,
            output_type="latent",
            guidance=terms,
        ).images
        torch.testing.assert_close(latents, made[name]["latents"], rtol=1e-4, atol=1e-4)


def test_names_kept_by_our_pipeline(root, tmp_path):
    named = OTDiTPipeline.from_pipe(
        OTDiTPipeline.from_pretrained(root / "dit"), id2label=dict(enumerate(NAMES))
    )
    named.save_pretrained(tmp_path)
    assert Generator.load(tmp_path).classes == NAMES
