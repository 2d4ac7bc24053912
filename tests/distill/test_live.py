"""Runs that store no soft labels: the teachers in the folder label again, to the bit."""

import json
import pickle
import shutil

import pytest
import torch
from distill.finished_run import DATA, LABELLED, finished_run, same, settings
from distill.surroundings import SURROUNDINGS
from torch.utils.data import DataLoader

import otdd
from otdd.distill import relabel, students
from otdd.distill.config import ConfigError
from otdd.distill.export import export
from otdd.distill.pipeline import run_stages
from otdd.distill.preview import preview
from otdd.distill.setfiles import TEACHERS
from otdd.distill.store import Store, StoreError

TEACHER = {"teacher_epochs": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A teacher that a run is given as a file, in the way of torch."""
    path = tmp_path_factory.mktemp("given") / "given.pt"
    torch.save(students.make_network("convnet-3", DATA, 5).body.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "live"
    finished_run(path, relabel={**TEACHER, "store_labels": False})
    return path


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_replay_is_that_of_stored_labels_to_the_bit(folder, tmp_path, workers):
    finished_run(tmp_path / "stored", 1, LABELLED, relabel=TEACHER)
    stored = otdd.load(tmp_path / "stored", set="random").replay(workers=workers)
    live = otdd.load(folder, set="random").replay(workers=workers)
    assert len(live) == len(stored) == 3 * 3
    assert all(same(one, other) for one, other in zip(stored, live, strict=True))


@pytest.mark.parametrize("stored", [True, False])
def test_steps_in_any_order_and_no_others(folder, tmp_path, stored):
    if stored:
        finished_run(tmp_path, 1, LABELLED, relabel=TEACHER)
    steps = otdd.load(tmp_path if stored else folder, set="random").replay().dataset
    in_order = list(steps)  # which ends
    assert len(in_order) == 9
    assert same(steps[-1], in_order[-1])
    again = DataLoader(steps, batch_size=None, sampler=[7, 2])
    assert all(same(one, in_order[n]) for one, n in zip(again, (7, 2), strict=True))
    for number in (9, -10):
        with pytest.raises(IndexError, match=f"step {number} is out of range; there are 9"):
            steps[number]
    with pytest.raises(ValueError, match="batch_size: 2 is not accepted; expected None"):
        next(iter(DataLoader(steps, batch_size=2)))


@pytest.mark.parametrize(
    "kept",
    [
        {"label_format": "q4"},
        {"label_format": "topk", "top_k": 3},
        {"label_epochs": 2, "mixup": 0.8, "patch_shuffle": 2},
        {"teachers": ["convnet", "convnet"]},
    ],
    ids=lambda kept: "-".join(map(str, kept)),
)
def test_whatever_the_settings(tmp_path, kept):
    for name, stored in (("stored", True), ("live", False)):
        changes = {"sets": ["random"], "train": {"epochs": 3, "batch": 8, "losses": ["otm"]}}
        given = {**TEACHER, **kept, "store_labels": stored}
        finished_run(tmp_path / name, relabel=given, **changes)
    both = [otdd.load(tmp_path / name, set="random") for name in ("stored", "live")]
    assert both[0].epochs == both[1].epochs == kept.get("label_epochs", 3)
    pairs = zip(*(loaded.replay(start=1) for loaded in both), strict=True)
    assert all(same(one, other) for one, other in pairs)


def test_teachers_that_were_given_go_with_the_folder(tmp_path, checkpoint, monkeypatch):
    """A file, and a pretrained network (here without its weights): neither is there later."""
    timm = students.import_timm()
    body = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    body.pretrained_cfg = {**body.pretrained_cfg, "mean": (0.3,), "std": (0.2,)}
    names = [f"convnet-3={checkpoint}", "timm:test_resnet.r160_in1k"]
    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *_, **__: body)
        given = {**TEACHER, "teachers": names, "store_labels": False}
        finished_run(tmp_path / "live", 1, LABELLED, sets=["random"], relabel=given)
    teachers = [students.load_checkpoint("convnet-3", checkpoint, DATA).eval()]
    teachers.append(students.Normalized(body, (0.3,), (0.2,)).eval())
    moved = shutil.move(tmp_path / "live", tmp_path / "elsewhere")
    checkpoint.rename(checkpoint.with_name("gone.pt"))
    first = next(iter(otdd.load(moved, set="random").replay()))
    with torch.no_grad():
        expected = (teachers[0](first.images) + teachers[1](first.images)) / 2
    assert torch.equal(first.logits, expected.half().float())


def test_a_teacher_of_other_weights_is_refused_before_any_work(tmp_path):
    """Else labels of one set would be of other teachers than those of the next."""
    file, out = tmp_path / "given.pt", tmp_path / "run"
    torch.save(students.make_network("convnet-3", DATA, 5).body.state_dict(), file)
    given = {**TEACHER, "teachers": [f"convnet-3={file}"]}
    finished_run(out, 1, LABELLED, sets=["random"], relabel=given)
    before = (out / TEACHERS).read_bytes()
    torch.save(students.make_network("convnet-3", DATA, 6).body.state_dict(), file)
    with pytest.raises(StoreError, match=r"relabel\.teachers_sha256: \['\w+'\] there"):
        run_stages(settings(out, sets=["random", "kmeans"], relabel=given), ("sample", "relabel"))
    assert (out / TEACHERS).read_bytes() == before
    assert not (out / "sets/kmeans").exists()
    torch.save({"x": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match="does not hold a convnet-3"):
        run_stages(settings(tmp_path / "new", relabel=given), ("sample",))
    assert not (tmp_path / "new").exists()


def test_finished_teachers_are_not_made_again(folder, monkeypatch):
    def never(*_, **__):
        raise AssertionError("teachers are there")

    monkeypatch.setattr(relabel, "make_teachers", never)
    config = settings(folder, relabel={**TEACHER, "store_labels": False})
    stages = ("sample", "relabel", "train", "evaluate")
    run_stages(config, stages)
    text = str(preview(config, stages))
    assert "1 teacher (convnet), kept in place of labels; they label while students train" in text
    assert ": finished" in text


def test_lost_teachers_are_made_again_the_same(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (weights,) = (copy / "teachers").glob("*")
    before = weights.read_bytes()
    weights.unlink()
    with pytest.raises(StoreError, match="no teachers who could make them; `otdd relabel --out"):
        otdd.load(copy, set="random").replay()
    run_stages(settings(copy, relabel={**TEACHER, "store_labels": False}), ("relabel",))
    assert weights.read_bytes() == before
    assert len(otdd.load(copy, set="random").replay()) == 9


def _other_weights(copy, name):
    network = students.make_network("convnet", DATA, 9)
    Store(copy).write_tensors(name, network.state_dict(), {"arch": "convnet"})


def _other_network(copy, name):
    network = students.make_network("convnet-3", DATA, 0)
    Store(copy).write_tensors(name, network.state_dict(), {"arch": "convnet"})


def _unknown(copy, name):
    Store(copy).write_tensors(name, Store(copy).read_tensors(name), {"arch": "no_such_net"})


def _no_name(copy, name):
    Store(copy).write_tensors(name, Store(copy).read_tensors(name))


def _cut(copy, name):
    (copy / name).write_bytes((copy / name).read_bytes()[:-9])


def _outside(copy, name):
    facts = json.loads((copy / TEACHERS).read_text())
    facts["teachers"][0]["file"] = "../" + name
    (copy / TEACHERS).write_text(json.dumps(facts))


def _other_facts(copy, **facts):
    made = json.loads((copy / TEACHERS).read_text())
    made["teachers"][0] = {k: v for k, v in {**made["teachers"][0], **facts}.items() if v}
    (copy / TEACHERS).write_text(json.dumps(made))


def _long(copy, name):
    _other_facts(copy, file=f"teachers/{'a' * 400}.safetensors")


def _no_digest(copy, name):
    _other_facts(copy, digest=None)


def _nobody(copy, name):
    _other_facts(copy, name=None)


def _other_channels(copy, name):
    state, meta = Store(copy).read_tensors(name), Store(copy).read_meta(name)
    Store(copy).write_tensors(name, {**state, "mean": torch.zeros(3, 1, 1)}, meta)


def _no_list(copy, name):
    (copy / TEACHERS).write_text("[1, 2]")


DAMAGE = {
    _other_weights: "is not teacher convnet of teachers.json: other weights",
    _other_network: "does not hold teacher convnet: ",
    _unknown: "does not hold teacher convnet: unknown architecture 'no_such_net'",
    _no_name: "does not hold teacher convnet",
    _cut: "damaged",
    _outside: "no teachers who could make them",
    _no_list: "no teachers who could make them",
    _long: "no teachers who could make them",
    _no_digest: "no teachers who could make them",
    _nobody: "no teachers who could make them",
    _other_channels: "does not hold teacher convnet: Given groups=1",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_what_is_damaged_is_named(folder, tmp_path, damage):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (weights,) = (copy / "teachers").glob("*")
    damage(copy, f"teachers/{weights.name}")
    with pytest.raises(StoreError, match=DAMAGE[damage]):
        otdd.load(copy, set="random", verify=False).replay()
    with pytest.raises(StoreError, match=r"damaged|other weights|does not hold"):
        otdd.load(copy, set="random").replay()


def test_where_teachers_may_be(folder, tmp_path):
    loaded = otdd.load(folder, set="random")
    assert not loaded.has_soft_labels
    assert loaded.soft_labels is None
    with pytest.raises(ConfigError, match="device: 'meta' is not accepted; expected cpu or cuda"):
        loaded.replay(device="meta")
    with pytest.raises(ConfigError, match="device: 'cuda' is not accepted; expected cpu, unless"):
        loaded.replay(device="cuda", workers=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(folder):
    with pytest.raises(ConfigError, match="device: 'cuda' is not accepted for process 0"):
        otdd.load(folder, set="random").replay(device="cuda")


def test_the_card_says_how(folder):
    text = (folder / "README.md").read_text()
    assert "in distilled.replay():" in text
    assert "the networks in `teachers/` label every view" in text


def test_cards_where_teachers_are_not(folder, tmp_path):
    """Neither an export has them, nor the folder of an earlier version that did not name them."""
    export(folder, "hf", tmp_path / "export", set="random")
    copy = shutil.copytree(folder, tmp_path / "copy")
    facts = Store(copy).read_json(TEACHERS)
    for teacher in facts["teachers"]:
        del teacher["file"]
    with Store.open(copy, {}) as store:
        store.write_json(TEACHERS, facts)
    config = settings(copy, relabel={**TEACHER, "store_labels": False})
    run_stages(config, ("evaluate",))
    for path in (tmp_path / "export", copy):
        assert "replay" not in (path / "README.md").read_text()
    run_stages(config, ("relabel", "evaluate"))
    assert "the networks in `teachers/`" in (copy / "README.md").read_text()
    assert len(otdd.load(copy, set="random").replay()) == 9


def test_hard_labels_alone_need_no_teachers(tmp_path):
    given = {**TEACHER, "store_labels": False}
    train = {"epochs": 1, "losses": ["ce"]}
    finished_run(tmp_path / "hard", sets=["random"], relabel=given, train=train)
    with pytest.raises(StoreError, match=r"run `otdd relabel` first, with --train\.losses kl"):
        otdd.load(tmp_path / "hard", set="random").replay()
    assert "replay" not in (tmp_path / "hard" / "README.md").read_text()


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_whatever_a_notebook_has_set(folder, name):
    """Teachers in float64 were "other weights", and on another device no teachers."""
    expected = otdd.load(folder, set="random").replay().dataset[4]
    with SURROUNDINGS[name]():
        loaded = otdd.load(folder, set="random")
        made = loaded.replay().dataset[4]
    assert same(made, expected)


@pytest.mark.parametrize("arch", ["convnet", "test_resnet"])
def test_it_goes_to_workers_that_are_spawned(folder, tmp_path, arch):
    """They import timm as otdd does, not as the pickle of a network would have them."""
    if arch != "convnet":
        folder = tmp_path / "live"
        given = {**TEACHER, "teachers": [arch], "store_labels": False}
        finished_run(folder, 1, LABELLED, sets=["random"], relabel=given)
    here = otdd.load(folder, set="random").replay().dataset
    pickled = pickle.dumps(here)
    assert b"timm" not in pickled
    assert same(here[5], pickle.loads(pickled)[5])
