"""A set as a Hugging Face data set: parquet files, and a card that says what they are."""

from __future__ import annotations

import html
import io
import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from otdd.distill.artefact import DistilledSet
from otdd.distill.config import ConfigError
from otdd.distill.formats import pictures
from otdd.distill.store import Store
from otdd.distill.words import averaged

CARD = "README.md"
SHARD_ROWS, SHARD_BYTES = 50_000, 256 * 2**20
ROW_GROUP = 100  # images in one piece of a file that is streamed
MANY = 1000  # classes and accuracies that the card lists
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (10**6, "100K<n<1M"))


def hf(target: Store, loaded: DistilledSet, manifest: dict[str, Any]) -> None:
    """Writes the parquet files, the card, the figures and a picture of the set."""
    from otdd.distill.export import METRICS, without_paths
    from otdd.distill.plots import grid

    _write_parquet(target, loaded)
    pair = (loaded.images, loaded.labels)
    target.write_bytes("grid.png", grid({loaded.name: pair}, loaded.classes))
    store, metrics = loaded.files.store, {}
    if store.has(METRICS):
        metrics = without_paths(store.read_json(METRICS))
        target.write_json(METRICS, metrics)
    target.write_bytes(CARD, card(loaded, manifest, metrics).encode())


def _write_parquet(target: Store, loaded: DistilledSet) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ConfigError(f'--to hf: {error}; pip install "otdd[hub]"') from None
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
        target.write_bytes(f"data/train-{number:05d}.parquet", buffer.getvalue())
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


def card(loaded: DistilledSet, manifest: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The card: a head that the Hub and `datasets` read, then what a person wants to know."""
    import yaml

    names = {str(label): name for label, name in enumerate(loaded.classes)}
    features: list[dict[str, Any]] = [
        {"name": "image", "dtype": "image"},
        {"name": "label", "dtype": {"class_label": {"names": names}}},
    ]
    if loaded.has_soft_labels:
        length = len(loaded.classes)
        features.append({"name": "soft_label", "sequence": "float32", "length": length})
    files = [{"split": "train", "path": "data/train-*.parquet"}]
    size = next((name for limit, name in SIZES if len(loaded) < limit), "1M<n<10M")
    head = {
        "license": manifest["license"],
        "pretty_name": f"{loaded.files.data['name']}, distilled",
        "task_categories": ["image-classification"],
        "size_categories": [size],
        "tags": ["dataset-distillation", "optimal-transport", "otdd"],
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {"features": features},
    }
    text = yaml.safe_dump(head, allow_unicode=True, sort_keys=False, width=100)
    return f"---\n{text}---\n\n" + "\n\n".join(_body(loaded, manifest, metrics)) + "\n"


def _body(loaded: DistilledSet, manifest: dict[str, Any], metrics: dict[str, Any]) -> Iterator[str]:
    data, config = loaded.files.data, manifest["config"]
    shape = "x".join(map(str, data["image_shape"]))
    yield f"# {_plain(data['name'])}, distilled"
    yield (
        f"{len(loaded)} images of {shape} (channels, height, width) in {len(loaded.classes)} "
        f"classes, {config.get('ipc', '?')} per class: the set `{loaded.name}` made by "
        f"otdd {manifest['exported_with']} from "
        f"{_plain(data['name'])}. Licence: {_plain(manifest['license'])}."
    )
    yield "![the images by class](grid.png)"
    yield "\n".join(_usage(loaded))
    if metrics.get("accuracy"):
        yield "## Measured"
        yield "\n".join(_figures(loaded.name, metrics))
    yield "## Classes"
    listed = [f"{k}. {_plain(name)}" for k, name in enumerate(loaded.classes[:MANY])]
    yield "\n".join([*listed, *(["..."] if len(loaded.classes) > MANY else [])])
    yield "## Made with"
    shown = {"mean": loaded.mean, "deviation": loaded.std}
    yield "\n".join(
        [f"* {k} of the real images in [0, 1]: {', '.join(map(str, v))}" for k, v in shown.items()]
        + [f"* seed {config.get('seed', '?')}; all settings, hashes and versions: `otdd.json`"]
    )


def _usage(loaded: DistilledSet) -> Iterator[str]:
    yield from ("```python", "import datasets, otdd", "")
    yield 'table = datasets.load_dataset("path/or/repository", split="train")'
    yield 'distilled = otdd.load("path")  # a torch Dataset'
    if loaded.has_soft_labels:
        yield "for images, logits, targets, labels in distilled.replay():"
        yield "    ...  # the augmented batches that the teachers labelled"
    yield from ("```", "")
    yield "`images/` has the same images by class; `classes.json` names its folders in order."
    if loaded.has_soft_labels:
        yield "`soft_label` is the mean of the logits of the teachers; softmax gives probabilities."
        yield "`labels*.safetensors` has the logits and the augmentation of every view, the logits"
        yield "in the format that the file names (float16 if it names none)."


def _figures(name: str, metrics: dict[str, Any]) -> Iterator[str]:
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
