"""The README's table of what soft labels weigh: 1000 classes, 300 epochs, batches of 100.

python benchmarks/label_storage.py                      # the table, printed
python benchmarks/label_storage.py --readme README.md   # and put between its markers
"""

import argparse
from pathlib import Path

from report import into_readme

from otdd.distill import students
from otdd.distill.labels import LabelFormat, storage

MARKERS = "<!-- labels -->", "<!-- /labels -->"
FKD = {10: 6e9, 50: 30e9}  # bytes for ImageNet-1K at 300 epochs, as reported of FKD's folders
EPOCHS = 300
FORMATS = {  # and the epochs that are labelled
    "`fp16`": (LabelFormat(), EPOCHS),
    "`q8`": (LabelFormat("q8"), EPOCHS),
    "`q4`": (LabelFormat("q4"), EPOCHS),
    "`topk`, 32 of 1000": (LabelFormat("topk", 32), EPOCHS),
    "`topk`, 10": (LabelFormat("topk", 10), EPOCHS),
    "`topk`, 4 (default)": (LabelFormat("topk", 4), EPOCHS),
    "`fp16`, `--relabel.label-epochs 7`": (LabelFormat(), 7),
    "`q8`, `--relabel.label-epochs 14`": (LabelFormat("q8"), 14),
    "`q4`, `--relabel.label-epochs 27`": (LabelFormat("q4"), 27),
}
TEACHERS = ("mobilenetv2_100", "resnet18")  # who label while students train


def table() -> str:
    """One line per format: size and share of FKD's at each number of images per class."""
    head = ["`--relabel.label-format`", "bytes a label"]
    head += [text for ipc in FKD for text in (f"IPC {ipc}", "of FKD's")]
    lines = [head, ["---"] * len(head)]
    lines.append(["FKD", "2000"] + [c for size in FKD.values() for c in (gigabytes(size), "100 %")])
    for name, (labels, epochs) in FORMATS.items():
        line = [name, str(labels.row_bytes(1000))]
        for ipc, theirs in FKD.items():
            size = storage(labels, ipc, epochs=epochs)
            line += [gigabytes(size), share(size, theirs)]
        lines.append(line)
    for arch in TEACHERS:
        size = weights(arch)
        line = [f"`--relabel.no-store-labels`, one {arch} as teacher", "0"]
        line += [c for theirs in FKD.values() for c in (gigabytes(size), share(size, theirs))]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def weights(arch: str) -> int:
    """Bytes of the file of a teacher of 1000 classes, but for its header."""
    network = students.import_timm().create_model(arch, num_classes=1000)
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def share(size: float, theirs: float) -> str:
    return f"{100 * size / theirs:.3g} %"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", type=Path)
    arguments = parser.parse_args()
    print(table())
    if arguments.readme:
        into_readme(arguments.readme, table(), MARKERS)
