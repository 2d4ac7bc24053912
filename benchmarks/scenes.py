r"""An image folder of colour photographs that no setting of otdd was chosen on.

Patches of seven pictures that come with scikit-learn, scikit-image and Matplotlib, 32x32, made as
the data `textures` is: of the left of each picture to train, of its right to test, which show
other things. With `--split tiles` every third square of 64 pixels is for tests instead, so that
both parts show all of a picture. Pictures are first made 300 pixels on their shorter side.

    python benchmarks/scenes.py scenes
    otdd fit --data scenes --out scenes.safetensors
    python benchmarks/ablation_labels.py --data scenes --generator scenes.safetensors --epochs 100 \
        --archs convnet --arms run run-no-otg full no-otg random kmeans --ipc 1 5
"""

import argparse
from pathlib import Path

import matplotlib
import skimage.data
import sklearn.datasets
from PIL import Image

SIDE, SHORTER = 32, 300
TRAIN, TEST = (6, 400), (12, 60)  # stride between patches, and how many of them
TILE = 64


def pictures() -> dict[str, Path]:
    """The pictures by their class."""
    skimage_folder = Path(skimage.data.__file__).parent
    found = [skimage_folder / name for name in ("astronaut.png", "hubble_deep_field.jpg")]
    found += [skimage_folder / name for name in ("retina.jpg", "rocket.jpg")]
    found += [
        Path(sklearn.datasets.__file__).parent / "images" / n for n in ("china.jpg", "flower.jpg")
    ]
    found += [Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"]
    return {path.stem: path for path in found}


def areas(width: int, height: int, split: str) -> dict[str, list[tuple[int, int, int, int]]]:
    """Boxes of a picture (left, top, right, bottom) to take patches from; no pixel is in both."""
    if split == "halves":
        border = int(width * 0.6)
        return {"train": [(0, 0, border, height)], "test": [(border, 0, width, height)]}
    parts: dict[str, list[tuple[int, int, int, int]]] = {"train": [], "test": []}
    for row in range(height // TILE):
        for column in range(width // TILE):
            part = "test" if (row + column) % 3 == 0 else "train"
            left, top = column * TILE, row * TILE
            parts[part].append((left, top, left + TILE, top + TILE))
    return parts


def patches(
    picture: Image.Image, boxes: list[tuple[int, int, int, int]], stride: int, count: int
) -> list[Image.Image]:
    """At most `count` patches, evenly spread over the boxes."""
    corners = [
        (left, top)
        for first, upper, last, lower in boxes
        for top in range(upper, lower - SIDE + 1, stride)
        for left in range(first, last - SIDE + 1, stride)
    ]
    count = min(count, len(corners))
    step = (len(corners) - 1) / max(count - 1, 1)
    chosen = [corners[round(step * number)] for number in range(count)]
    return [picture.crop((left, top, left + SIDE, top + SIDE)) for left, top in chosen]


def write(folder: Path, split: str) -> None:
    """`folder`/{train,test}/<class>/<number>.png."""
    for name, path in pictures().items():
        with Image.open(path) as file:
            picture = file.convert("RGB")
        scale = SHORTER / min(picture.size)
        picture = picture.resize([round(scale * length) for length in picture.size], Image.LANCZOS)
        boxes = areas(*picture.size, split)
        for part, spread in (("train", TRAIN), ("test", TEST)):
            target = folder / part / name
            target.mkdir(parents=True)
            for number, patch in enumerate(patches(picture, boxes[part], *spread)):
                patch.save(target / f"{number:03}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="must not be there")
    parser.add_argument("--split", choices=("halves", "tiles"), default="halves")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"folder: {args.folder} is there already")
    write(args.folder, args.split)
    print(f"{args.folder}: {len(pictures())} classes")


if __name__ == "__main__":
    main()
