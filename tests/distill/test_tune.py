"""Fine-tuning a DiT: what is frozen keeps its bits, and the folder is an ordinary pipeline."""

import json
import signal
import sys

import pytest
import torch
from distill import tiny

from otdd.distill import tune as tuning
from otdd.distill.codec import import_diffusers
from otdd.distill.config import ConfigError
from otdd.distill.fit import FitConfig
from otdd.distill.generator import Generator, GeneratorError, load_generator
from otdd.distill.store import StoreError
from otdd.distill.tune import (
    TABLE,
    check_out,
    choose,
    fold,
    load_base,
    tune,
    with_classes,
)

OLD = ["c1", "sofa", "lamp"]
SETTINGS = {"steps": 4, "batch": 8, "checkpoint_every": 2, "grid_every": 0, "lr": 1e-2, "rank": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("dit") / "base"
    tiny.dit_pipeline(learned=True).save_pretrained(path)
    (path / "classes.json").write_text(json.dumps(OLD))
    return path


@pytest.fixture(scope="module")
def data():
    return tiny.images(counts=(5, 9), side=8, channels=3)


def is_bias_or_table(name: str) -> bool:
    return name.endswith(("bias", TABLE))


# Which weights may differ from the base after the training.
TRAINED = {
    "embeddings": lambda name: name.endswith(TABLE),
    "lora": lambda name: name.endswith((TABLE, *(f"{part}.weight" for part in tuning.ADAPTED))),
    "difffit": lambda name: (
        is_bias_or_table(name) or name.removesuffix(".weight").endswith(tuning.SCALED)
    ),
    "all": lambda name: True,
}


@pytest.mark.parametrize("method", TRAINED)
def test_frozen_weights_keep_their_bits(folder, data, tmp_path, method):
    base = load_base(folder)
    before = {k: v.clone() for k, v in base.transformer.state_dict().items()}
    made = tune(data, base, FitConfig(tune=method, **SETTINGS), tmp_path / "out")
    after = made.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in base.transformer.state_dict().items())
    wanted = {k for k in before if TRAINED[method](k) and "pos_embed.pos" not in k}
    # The null class is in the table, the labels of the base are not.
    same = {k for k in before if after[k].shape == before[k].shape and after[k].equal(before[k])}
    assert same == before.keys() - wanted
    vae = Generator.load(folder).codec.tensors()
    assert all(torch.equal(v, vae[k]) for k, v in made.codec.tensors().items())


@pytest.mark.parametrize("method", TRAINED)
def test_folding_changes_no_output(data, method):
    base = tiny.transformer(3, learned=True)
    model = choose(with_classes(base, OLD, data.classes), method, rank=2)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    x, labels = torch.randn(4, 4, 4, 4, generator=draw), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        want = model(x, timestep=torch.tensor([7] * 4), class_labels=labels).sample
        plain = fold(model)
        got = plain(x, timestep=torch.tensor([7] * 4), class_labels=labels).sample
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert plain.state_dict().keys() == base.state_dict().keys()


def test_low_rank_updates_have_their_rank(folder, data, tmp_path):
    base = load_base(folder)
    made = tune(data, base, FitConfig(tune="lora", **SETTINGS), tmp_path / "out")
    name = "transformer_blocks.0.attn1.to_q.weight"
    change = made.transformer.state_dict()[name] - base.transformer.state_dict()[name]
    values = torch.linalg.svdvals(change)
    assert values[1] > 1e-6
    assert values[2] < 1e-3 * values[1]


def test_classes_known_by_name_keep_their_embedding():
    base = tiny.transformer(3)
    made = with_classes(base, OLD, ["tree", "c1"])
    name = f"transformer_blocks.0.norm1.emb.{TABLE}"
    old, new = base.state_dict()[name], made.state_dict()[name]
    assert torch.equal(new[1], old[0])
    assert torch.equal(new[2], old[3])  # no class
    torch.testing.assert_close(new[0], old[:3].mean(0))


def test_the_folder_is_a_pipeline_and_a_generator(folder, data, tmp_path):
    made = tune(data, load_base(folder), FitConfig(tune="difffit", **SETTINGS), tmp_path / "out")
    assert load_generator(tmp_path / "out", data).classes == ["c0", "c1"]
    pipe = import_diffusers().DiTPipeline.from_pretrained(tmp_path / "out")
    assert pipe.transformer.config.num_embeds_ada_norm == 2
    assert pipe.scheduler.config.clip_sample is False
    assert {"trained", "weights", "loss", "steps"} <= made.info.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("method", ["lora", "difffit"])
def test_interrupted_tuning_ends_with_the_same_bytes(folder, data, tmp_path, method):
    config, base = FitConfig(tune=method, **SETTINGS), load_base(folder)

    def interrupt(_: str, step: int, *__: object) -> None:
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="3 of 4 steps"):
        tune(data, base, config, tmp_path / "cut", progress=interrupt)
    assert not (tmp_path / "cut").exists()
    for name in ("cut", "whole"):
        tune(data, base, config, tmp_path / name)
    (tmp_path / "cut.checkpoint").write_bytes(b"left by a kill after the last write")
    tune(data, base, config, tmp_path / "cut")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    other = FitConfig(**SETTINGS, tune=method, seed=1)
    for refuse in (tune, check_out):
        with pytest.raises(StoreError, match="another training"):
            refuse(data, base, other, tmp_path / "whole")
    check_out(data, base, config, tmp_path / "whole")


def test_what_cannot_be_tuned_is_refused(folder, data, tmp_path, monkeypatch):
    base, out = load_base(folder), tmp_path / "out"
    with pytest.raises(ConfigError, match="from: 'nowhere' is not accepted; expected a folder"):
        load_base("nowhere")
    with pytest.raises(GeneratorError, match="no DiT pipeline"):
        load_base(tmp_path)
    with pytest.raises(ConfigError, match=r"resolution: the DiT makes .* 8x8, the data has 16x16"):
        tune(tiny.images(side=16, channels=3), base, FitConfig(**SETTINGS), out)
    with pytest.raises(ConfigError, match="layers: 3 is not accepted with --from"):
        tune(data, base, FitConfig(layers=3, **SETTINGS), out)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"tune: lora needs peft: pip install \"otdd\[tune\]\""):
        tune(data, base, FitConfig(tune="lora", **SETTINGS), out)
    assert list(tmp_path.iterdir()) == []


def test_from_the_command_line(folder, tmp_path, capsys):
    from otdd import tools
    from otdd.distill.store import png

    for name, count in (("sofa", 3), ("tree", 8)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for n in range(count):
            picture = torch.full((3, 11, 9), 20 * n, dtype=torch.uint8)
            (tmp_path / "photos" / name / f"{n}.png").write_bytes(png(picture))
    out = str(tmp_path / "out")
    flags = ["--data", str(tmp_path / "photos"), "--out", out, "--steps", "2", "--batch", "4"]
    assert tools.fit([*flags, "--from", str(folder), "--tune", "embeddings"]) == 0
    printed = capsys.readouterr()
    weights = sum(v.numel() for v in tiny.transformer(2, learned=True).parameters())
    assert f"48 of {weights:,} weights trained in" in printed.out  # a table of 3 x 16 in one block
    assert "peak memory" in printed.out
    assert "loss" in printed.err
    assert Generator.load(out).classes == ["sofa", "tree"]
    (picture,) = (tmp_path / "out.grids").iterdir()
    assert picture.name == "step-000002.png"
