"""Settings: defaults, files, presets, and refusals that name the key."""

import json
import subprocess
import sys

import pytest

from otdd.distill.config import (
    PRESETS,
    ConfigError,
    DiversityConfig,
    GuidanceConfig,
    InfluenceConfig,
    ModeConfig,
    RelabelConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from otdd.distill.settings import identity, load_yaml, merge, resolve, to_dict

BASE = {"data": "digits", "ipc": 1, "out": "x"}


def test_defaults_and_round_trip():
    config = resolve(BASE)
    assert config == RunConfig(data="digits", ipc=1, out="x")
    assert resolve(to_dict(config)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ipc": 0}, "ipc: 0 is not accepted; expected an integer >= 1"),
        ({"train": {"beta_2_share": 0}}, "train.beta_2_share: 0.0 is not accepted"),
        (
            {"train": {"kappa_1": 0, "kappa_2": 0, "beta_2": 0}},
            r"train.kappa_1, kappa_2, beta_2: \(0.0, 0.0, 0.0\) is not .* one of them > 0",
        ),
        ({"ipc": True}, "ipc: True is not accepted"),
        ({"ipc": "many"}, "ipc: 'many' is not accepted; expected an integer"),
        ({"sampel": {}}, "sampel: unknown setting; did you mean sample"),
        ({"sample": {"stepz": 1}}, "sample.stepz: unknown setting; did you mean sample.steps"),
        ({"sample": 3}, "sample: 3 is not accepted; expected a group of settings"),
        ({"sample": {"guidance": {"strength": -1}}}, "sample.guidance.strength: -1.0"),
        ({"sample": {"guidance": {"window": [0.5]}}}, "sample.guidance.window: .* 2 values"),
        (
            {"sample": {"guidance": {"metric": "l3"}}},
            "sample.guidance.metric: 'l3'.* one of l1, l2",
        ),
        ({"sets": ["otg", "best"]}, "sets: 'best'.*one of otg, unguided"),
        ({"train": {"batch": 2.5}}, "train.batch: 2.5.* integer"),
        ({"train": {"ema": 1}}, "train.ema: 1.0"),
        ({"relabel": {"crop_scale": [0, 1]}}, "relabel.crop_scale"),
        ({"preset": "best"}, "preset: 'best'.*one of paper, igd, dit, mgd"),
        ({"sample": {"influence": {"strength": -1}}}, "sample.influence.strength: -1.0"),
        ({"sample": {"modes": {"window": [0.5, 0.5]}}}, "sample.modes.window: "),
        ({"relabel": {"flip": ["on"]}}, r"relabel.flip: \['on'\] is not .* one of auto, on, off"),
        ({"train": {"protocol": ["edc"]}}, r"train.protocol: \['edc'\] is not .* one of edc, rded"),
        ({"ipc": "²", "train": {"protocol": "rded"}}, "ipc: '²' is not accepted"),
        ({"out": 5}, "out: 5 is not accepted; expected a text"),
    ],
)
def test_refusals_name_key_value_and_what_is_accepted(values, message):
    with pytest.raises(ConfigError, match=message):
        resolve({**BASE, **values})


def test_missing_setting():
    with pytest.raises(ConfigError, match="ipc: missing; give --ipc"):
        resolve({"data": "digits", "out": "x"})


def test_flags_over_file_over_preset(tmp_path):
    file = tmp_path / "f.yaml"
    file.write_text("preset: paper\nsample:\n  steps: 7\n  guidance:\n    strength: 1\n")
    config = resolve({**BASE, "sample": {"guidance": {"strength": 0.5}}}, file=file)
    assert (config.sample.scheduler, config.sample.steps) == ("ddpm", 7)
    assert config.sample.guidance.strength == 0.5


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve(name):
    assert resolve({**BASE, "preset": name}).preset == name


def test_presets_switch_terms_on_and_off():
    on = {
        name: [
            term
            for term in ("guidance", "influence", "diversity", "modes")
            if getattr(resolve({**BASE, "preset": name}).sample, term).strength > 0
        ]
        for name in PRESETS
    }
    assert on == {
        "paper": ["guidance", "influence", "diversity"],
        "igd": ["influence", "diversity"],
        "dit": [],
        "mgd": ["modes"],
    }


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="neither YAML nor JSON"):
        load_yaml(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="a YAML mapping"):
        load_yaml(tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("sample: {steps: 4}\nsample: {starts: 1}", "line 2, column 1: sample is there twice"),
        ("sample:\n  steps: 4\n  'steps': 5", "line 3, column 3: steps is there twice"),
        ('{"ipc": 1, "ipc": 2}', "ipc is there twice"),
    ],
)
def test_a_setting_that_is_there_twice_is_refused(tmp_path, text, where):
    (tmp_path / "f").write_text(text)
    with pytest.raises(ConfigError, match=where):
        load_yaml(tmp_path / "f")


def test_merged_settings_may_be_replaced(tmp_path):
    (tmp_path / "f").write_text("sample: &a {steps: 4, starts: 1}\ntrain: {<<: *a, steps: 5}")
    assert load_yaml(tmp_path / "f")["train"] == {"steps": 5, "starts": 1}


@pytest.mark.parametrize("how", [{}, {"indent": "\t"}, {"ensure_ascii": False}])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_as_python_writes_it(tmp_path, how, encoding):
    settings = {"data": "fotos 😀", "sample": {"steps": 4, "influence": {"strength": 1e-3}}}
    text = json.dumps(settings, **how).replace("\n", "\r\n")
    (tmp_path / "f.json").write_bytes(text.encode(encoding))
    assert load_yaml(tmp_path / "f.json") == settings


def test_yaml_on_and_off_are_choices(tmp_path):
    (tmp_path / "f.yaml").write_text("relabel: {flip: off}")
    assert resolve(BASE, file=tmp_path / "f.yaml").relabel.flip == "off"


def test_identity_leaves_out_what_only_adds_rows():
    one, two = resolve(BASE), resolve({**BASE, "out": "y", "seeds": 9, "sets": ["otg"]})
    assert identity(one) == identity(two)
    other = resolve(merge(BASE, {"sample": {"guidance": {"strength": 1}}}))
    differing = {k for k, v in identity(one).items() if identity(other)[k] != v}
    assert differing == {"sample.guidance.strength"}


def test_no_torch():
    code = "import sys, otdd.distill.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_lists_and_exponents(tmp_path):
    with pytest.raises(ConfigError, match=r"sample\.guidance\.strength: inf"):
        resolve({**BASE, "sample": {"guidance": {"strength": float("inf")}}})
    with pytest.raises(ConfigError, match="each once"):
        resolve({**BASE, "sets": ["random", "random"]})
    (tmp_path / "f.yaml").write_text("train: {lr: 1e-3}")
    assert resolve(BASE, file=tmp_path / "f.yaml").train.lr == 1e-3


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (GuidanceConfig, "target", "zt"),
        (GuidanceConfig, "form", "q"),
        (GuidanceConfig, "metric", "l3"),
        (DiversityConfig, "target", "x_0"),
        (InfluenceConfig, "target", "z_t"),
    ],
)
def test_words_are_checked_from_python_too(kind, field, value):
    with pytest.raises(ConfigError, match=f"{field}: '{value}' is not accepted; expected one of "):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (TrainConfig, {"losses": "kl"}, "losses: 'kl' is not accepted; expected a tuple, each one"),
        (TrainConfig, {"losses": ("CE",)}, r"losses: \('CE',\) is not .* each one of ce, ce-plain"),
        (TrainConfig, {"lr": float("inf")}, "lr: inf is not accepted; expected a finite number"),
        (TrainConfig, {"epochs": True}, "epochs: True is not accepted; expected an integer"),
        (RelabelConfig, {"teachers": "convnet"}, "teachers: 'convnet' .* a tuple, each a text"),
        (RelabelConfig, {"store_labels": "no"}, "store_labels: 'no' .* expected True or False"),
        (SampleConfig, {"scheduler": "euler"}, "scheduler: 'euler' .* one of ddim, ddpm, dpm"),
        (SampleConfig, {"guidance": {}}, r"guidance: \{\} is not .* a GuidanceConfig"),
        (SampleConfig, {"batch_images": "all"}, "batch_images: 'all' .* an integer or auto"),
        (GuidanceConfig, {"strength": "1"}, "strength: '1' is not .* a finite number"),
        (GuidanceConfig, {"window": (0, 0.5, 1)}, "a tuple of 2, each a finite number"),
        (ModeConfig, {"strength": None}, "strength: None is not accepted"),
        (RunConfig, {**BASE, "sets": "otg"}, "sets: 'otg' is not accepted; expected a tuple"),
        (RunConfig, {**BASE, "ipc": "1"}, "ipc: '1' is not accepted; expected an integer"),
    ],
)
def test_types_are_checked_from_python_too(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**settings)
