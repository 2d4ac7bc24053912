r"""An image folder of colour photographs that no setting of otdd was chosen on.

Patches of seven pictures that come with scikit-learn, scikit-image and Matplotlib, 32x32, made as
the data `textures` is: of the left of each picture to train, of its right to test. Pictures are
first made 300 pixels on their shorter side.

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


def patches(picture: Image.Image, stride: int, count: int) -> list[Image.Image]:
    """At most `count` patches, evenly spread over the picture."""
    width, height = picture.size
    corners = [
        (left, top)
        for top in range(0, height - SIDE + 1, stride)
        for left in range(0, width - SIDE + 1, stride)
    ]
    count = min(count, len(corners))
    step = (len(corners) - 1) / max(count - 1, 1)
    chosen = [corners[round(step * number)] for number in range(count)]
    return [picture.crop((left, top, left + SIDE, top + SIDE)) for left, top in chosen]


def write(folder: Path) -> None:
    """`folder`/{train,test}/<class>/<number>.png."""
    for name, path in pictures().items():
        with Image.open(path) as file:
            picture = file.convert("RGB")
        scale = SHORTER / min(picture.size)
        picture = picture.resize([round(scale * length) for length in picture.size], Image.LANCZOS)
        width, height = picture.size
        border = int(width * 0.6)  # no pixel in both
        parts = {"train": (0, border, TRAIN), "test": (border, width, TEST)}
        for part, (left, right, spread) in parts.items():
            target = folder / part / name
            target.mkdir(parents=True)
            found = patches(picture.crop((left, 0, right, height)), *spread)
            for number, patch in enumerate(found):
                patch.save(target / f"{number:03}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="must not be there")
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"folder: {folder} is there already")
    write(folder)
    print(f"{folder}: {len(pictures())} classes")


if __name__ == "__main__":
    main()
