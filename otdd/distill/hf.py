"""Sets as a Hugging Face data set: parquet files, and a card that says what they are.

An exported folder holds one set, and its card one config; that of a run has a config for every
set.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from otdd import __version__
from otdd.distill.artefact import DistilledSet
from otdd.distill.choice import kept
from otdd.distill.formats import pictures
from otdd.distill.setfiles import DEFAULT, SetFiles
from otdd.distill.store import Store
from otdd.distill.words import averaged

CARD = "README.md"
ALONE = "default"  # config of a folder that holds one set
SHARD_ROWS, SHARD_BYTES = 50_000, 256 * 2**20
ROW_GROUP = 100  # images in one piece of a file that is streamed
MANY = 1000  # classes and accuracies that the card lists
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"))


def hf(target: Store, loaded: DistilledSet, manifest: dict[str, Any]) -> None:
    """Writes the parquet files, the card, the figures and a picture of the set."""
    from otdd.distill.export import METRICS, without_paths
    from otdd.distill.plots import grid

    _write_table(target, "data", loaded)
    pair = (loaded.images, loaded.labels)
    target.write_bytes("grid.png", grid({loaded.name: pair}, loaded.classes))
    store, metrics = loaded.files.store, {}
    if store.has(METRICS):
        metrics = without_paths(store.read_json(METRICS))
        target.write_json(METRICS, metrics)
    made = card(target, {ALONE: loaded}, manifest["license"], manifest["config"], metrics)
    target.write_bytes(CARD, made.encode())


def describe_run(
    store: Store, labelled: Mapping[str, bool], config: dict[str, Any], metrics: dict[str, Any]
) -> None:
    """Makes the folder of a run one that `datasets.load_dataset` reads, with tables and a card.

    Tables that are whole and have the right columns stay; so does a README of someone else.

    Args:
        store: of the run.
        labelled: set -> whether it has all its soft labels.
        config: settings of the run.
        metrics: what `metrics.json` holds.
    """
    from otdd.distill.export import without_paths

    sets = {}
    for name in sorted(labelled, key=lambda name: name != DEFAULT):  # the first is what is read
        files = SetFiles.find(store.path, name, verify=False)
        if not labelled[name]:
            files = replace(files, labels=())
        sets[name] = DistilledSet(files, verify=False)
        folder = f"sets/{name}/data"
        if not _is_written(store.path / folder, sets[name]):
            store.remove(folder)
            _write_table(store, folder, sets[name])
    made = card(store, sets, "unknown", without_paths(config), without_paths(metrics)).encode()
    path = store.path / CARD
    mine = CARD in store.sums.known() or (path.is_file() and path.read_bytes() == made)
    if mine or not path.exists():
        store.write_bytes(CARD, made)


def _is_written(folder: Path, loaded: DistilledSet) -> bool:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = [pq.ParquetFile(path) for path in folder.glob("*.parquet")]
    except pa.ArrowInvalid:  # cut short, in a folder that has lost its list of hashes
        return False
    columns = {tuple(file.schema_arrow.names) for file in found}
    rows = sum(file.metadata.num_rows for file in found)
    return rows == len(loaded) and columns == {tuple(_features(loaded))}


def _digest(folder: Path) -> str:
    """SHA-256 of all tables of a set."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.parquet")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _write_table(target: Store, folder: str, loaded: DistilledSet) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    soft, classes = loaded.soft_labels, len(loaded.classes)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = [pa.field("image", image), pa.field("label", pa.int64())]
    if soft is not None:
        fields.append(pa.field("soft_label", pa.list_(pa.float32(), classes)))
    about = json.dumps({"info": {"features": _features(loaded)}})
    schema = pa.schema(fields, metadata={"huggingface": about})
    done = 0
    for number, rows in enumerate(_shards(loaded)):
        pixels = [{"bytes": data, "path": f"{k:05d}_{i:05d}.png"} for k, i, data in rows]
        columns: list[Any] = [
            pa.array(pixels, type=image),
            pa.array([label for label, _, _ in rows], type=pa.int64()),
        ]
        if soft is not None:
            flat = pa.array(soft[done : done + len(rows)].reshape(-1).numpy())
            columns.append(pa.FixedSizeListArray.from_arrays(flat, classes))
        buffer = io.BytesIO()
        table = pa.Table.from_arrays(columns, schema=schema)
        pq.write_table(table, buffer, row_group_size=ROW_GROUP)
        target.write_bytes(f"{folder}/train-{number:05d}.parquet", buffer.getvalue())
        done += len(rows)


def _shards(loaded: DistilledSet) -> Iterator[list[tuple[int, int, bytes]]]:
    rows: list[tuple[int, int, bytes]] = []
    size = 0
    for row in pictures(loaded):
        if rows and (len(rows) >= SHARD_ROWS or size >= SHARD_BYTES):
            yield rows
            rows, size = [], 0
        rows.append(row)
        size += len(row[2])
    yield rows


def _features(loaded: DistilledSet) -> dict[str, Any]:
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": loaded.classes, "_type": "ClassLabel"},
    }
    if loaded.has_soft_labels:
        value = {"dtype": "float32", "_type": "Value"}
        length = len(loaded.classes)
        features["soft_label"] = {"feature": value, "length": length, "_type": "Sequence"}
    return features


def card(
    target: Store,
    sets: Mapping[str, DistilledSet],
    license: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> str:
    """The card: a head that the Hub and `datasets` read, then what a person wants to know.

    Args:
        target: has the tables of all sets.
        sets: config -> the set it holds. The first is what `load_dataset` reads if no name is
            given; one that is called `default` is alone in its folder.
        license: as the Hub spells it.
        config: settings of the run.
        metrics: what `metrics.json` holds, or nothing.
    """
    import yaml

    first = next(iter(sets.values()))
    size = next((name for limit, name in SIZES if len(first) < limit), "1M<n<10M")
    configs: list[dict[str, Any]] = []
    for name in sets:
        path = "data" if name == ALONE else f"sets/{name}/data"
        files = [{"split": "train", "path": f"{path}/train-*.parquet"}]
        # `datasets` keeps what it has read by the name of the folder and this head alone. Without
        # the hash it would take another folder of that name, or a changed one, for the same.
        about = f"sha256 {_digest(target.path / path)}"
        configs.append({"config_name": name, "data_files": files, "description": about})
    head: dict[str, Any] = {
        "license": license,
        "pretty_name": f"{first.files.data['name']}, distilled",
        "task_categories": ["image-classification"],
        "size_categories": [size],
        "tags": ["dataset-distillation", "optimal-transport", "otdd"],
        "configs": configs,
    }
    if ALONE in sets:
        head["dataset_info"] = {"features": _card_features(first)}
    else:
        configs[0]["default"] = True
    text = yaml.safe_dump(head, allow_unicode=True, sort_keys=False, width=100)
    return f"---\n{text}---\n\n" + "\n\n".join(_body(sets, license, config, metrics)) + "\n"


def _card_features(loaded: DistilledSet) -> list[dict[str, Any]]:
    names = {str(label): name for label, name in enumerate(loaded.classes)}
    features: list[dict[str, Any]] = [
        {"name": "image", "dtype": "image"},
        {"name": "label", "dtype": {"class_label": {"names": names}}},
    ]
    if loaded.has_soft_labels:
        length = len(loaded.classes)
        features.append({"name": "soft_label", "sequence": "float32", "length": length})
    return features


def _body(
    sets: Mapping[str, DistilledSet],
    license: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> Iterator[str]:
    first = next(iter(sets.values()))
    data, alone, one = first.files.data, ALONE in sets, len(sets) == 1
    shape = "x".join(map(str, data["image_shape"]))
    names = ", ".join(f"`{loaded.name}`" for loaded in sets.values())
    yield f"# {_plain(data['name'])}, distilled"
    yield (
        f"{'The set' if one else 'The sets'} {names} made by otdd {__version__} from "
        f"{_plain(data['name'])}: {len(first)} images{'' if one else ' each'} of {shape} "
        f"(channels, height, width) in {len(first.classes)} classes, {config.get('ipc', '?')} per "
        f"class. Licence: {_plain(license)}."
    )
    yield "![the images by class](grid.png)"
    yield "\n".join(_usage(sets))
    if metrics.get("accuracy"):
        yield "## Measured"
        yield "\n".join(_figures(first.name, metrics))
    yield "## Classes"
    listed = [f"{k}. {_plain(name)}" for k, name in enumerate(first.classes[:MANY])]
    yield "\n".join([*listed, *(["..."] if len(first.classes) > MANY else [])])
    yield "## Made with"
    shown = {"mean": first.mean, "deviation": first.std}
    about = "`otdd.json`" if alone else "`config.json`, `otdd.json` and `metrics.json`"
    yield "\n".join(
        [f"* {k} of the real images in [0, 1]: {', '.join(map(str, v))}" for k, v in shown.items()]
        + [f"* seed {config.get('seed', '?')}; all settings, hashes and versions: {about}"]
    )


def _usage(sets: Mapping[str, DistilledSet]) -> Iterator[str]:
    first, alone = next(iter(sets.values())), ALONE in sets
    other = None if len(sets) == 1 else list(sets)[1]
    live = first.files.live and not alone and bool(kept(first.files.store))
    yield from ("```python", "import datasets, otdd", "")
    yield 'table = datasets.load_dataset("path/or/repository", split="train")'
    if other:
        yield f'another = datasets.load_dataset("path/or/repository", "{other}", split="train")'
    yield 'distilled = otdd.load("path")  # a torch Dataset'
    if other:
        yield f'another = otdd.load("path", set="{other}")'
    if first.has_soft_labels or live:
        yield "for images, logits, targets, labels in distilled.replay():"
        yield "    ...  # the augmented batches that the teachers labelled"
    yield from ("```", "")
    if alone:
        yield "`images/` has the same images by class; `classes.json` names its folders in order."
    else:
        yield "`sets/*/images/` has the same images by class; `data.json` names them in order."
    if first.has_soft_labels:
        files = "labels*.safetensors" if alone else "sets/*/labels/*.safetensors"
        yield "`soft_label` is the mean of the logits of the teachers; softmax gives probabilities."
        yield f"`{files}` has the logits and the augmentation of every view, the logits"
        yield "in the format that the file names (float16 if it names none)."
    if live:
        yield "No soft labels are stored: the networks in `teachers/` label every view in `replay`."


def _figures(name: str, metrics: Mapping[str, Any]) -> Iterator[str]:
    yield "Test accuracy in %, mean and deviation over students; after the last step, and at best."
    yield from ("", "| set | labels | loss | student | accuracy | best | students |")
    yield "|---|---|---|---|---|---|---|"
    for row in metrics["accuracy"][:MANY]:
        marked = f"**{row['set']}**" if row["set"] == name else row["set"]
        cells: Sequence[Any] = (
            marked,
            *(_plain(row[k]) for k in ("labels", "loss", "arch")),
            averaged(row["mean"], row["std"], len(row["runs"]), 2),
            f"{row['best_mean']:.2f}",
            len(row["runs"]),
        )
        yield "| " + " | ".join(map(str, cells)) + " |"
    if metrics.get("ot_cost"):
        costs = ", ".join(f"{k} {v:.4g}" for k, v in metrics["ot_cost"].items())
        yield from ("", f"Transport cost to the real images: {costs}.")
    if metrics.get("teachers"):
        mean = statistics.fmean(t["accuracy"] for t in metrics["teachers"])
        count = len(metrics["teachers"])
        yield from ("", f"Teachers: {count}, right on {mean:.2f} % of the test images on average.")


def _plain(text: str) -> str:
    """A name as the text of a Markdown line or cell, whatever it contains."""
    shown = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"&#{ord(c)};" if c in "|`*_[]<>\\#!~" else c for c in shown)
