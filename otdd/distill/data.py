"""Real images to distil: two bundled data sets and any ImageFolder, checked before any work.

Everything is held as uint8 tensors in memory. A folder is read completely first, so that every
offending file or class is named in one `DataError` and nothing has been done yet.
"""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BUILTIN = ("digits", "textures")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
# PNG only: decoded to the same bytes by every version of every decoder.
TEXTURES = ("brick", "chelsea", "coffee", "coins", "grass", "gravel", "ihc", "motorcycle_left")
TEXTURE_SIZE = 32


class DataError(ValueError):
    """Data that cannot be distilled; `problems` names every offending file or class."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__("\n  ".join([message, *self.problems]))


@dataclass(frozen=True)
class LabeledImages:
    """Images uint8 (N, C, H, W) with labels int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def of_class(self, label: int) -> Tensor:
        """Images of one class, in file order."""
        return self.images[self.labels == label]


@dataclass(frozen=True)
class ImageData:
    """A data set: `classes[k]` names label k; mean and std are per channel, of train in [0, 1]."""

    name: str
    classes: list[str]
    train: LabeledImages
    test: LabeledImages
    mean: tuple[float, ...] = field(init=False)
    std: tuple[float, ...] = field(init=False)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        counts = _histogram(self.train.images)  # (C, 256): exact, and no float copy of the data
        levels = torch.arange(256, dtype=torch.float64) / 255
        share = counts / counts.sum(1, keepdim=True)
        mean = share @ levels
        std = (share @ levels.square() - mean.square()).clamp_min(0).sqrt().clamp_min(1e-3)
        object.__setattr__(self, "mean", tuple(round(v, 6) for v in mean.tolist()))
        object.__setattr__(self, "std", tuple(round(v, 6) for v in std.tolist()))
        object.__setattr__(self, "fingerprint", self._hash())

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def _hash(self) -> str:
        digest = hashlib.sha256(repr((self.classes, self.image_shape)).encode())
        for part in (self.train, self.test):
            digest.update(part.labels.numpy().tobytes())
            digest.update(memoryview(part.images.contiguous().numpy()).cast("B"))
        return digest.hexdigest()


def load_data(
    spec: str | os.PathLike[str],
    *,
    resolution: int | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
    ipc: int | None = None,
) -> ImageData:
    """Loads a data set.

    Args:
        spec: `digits`, `textures`, or a folder: either `train/<class>/*` with `val/` or `test/`
            beside it, or `<class>/*`, split here with `seed`.
        resolution: side of the square images; needed when a folder holds several sizes.
        val_fraction: part of each class kept for testing where the folder has no split.
        seed: seed of that split.
        ipc: images per class that will be asked for; a class with fewer is an error.

    Raises:
        DataError: what cannot be used, with every offending file or class.
    """
    if resolution is not None and resolution < 1:
        raise DataError(f"resolution must be a positive integer, got {resolution}")
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    if spec in BUILTIN:
        if resolution not in (None, 8 if spec == "digits" else TEXTURE_SIZE):
            raise DataError(f"resolution={resolution} does not fit the built-in data {spec!r}")
        data = _digits() if spec == "digits" else _textures()
    else:
        data = _folder(Path(spec), resolution, val_fraction, seed)
    if ipc is not None:
        check_ipc(data, ipc)
    return data


def check_ipc(data: ImageData, ipc: int) -> None:
    """Raises `DataError` naming every class with fewer than `ipc` training images."""
    if ipc < 1:
        raise DataError(f"ipc must be at least 1, got {ipc}")
    counts = torch.bincount(data.train.labels, minlength=data.num_classes).tolist()
    short = [
        f"{name}: {n} training images"
        for name, n in zip(data.classes, counts, strict=True)
        if n < ipc
    ]
    if short:
        raise DataError(f"ipc={ipc} asks for more images per class than there are in", short)


def _histogram(images: Tensor) -> Tensor:
    return torch.stack(
        [torch.bincount(c.reshape(-1), minlength=256) for c in images.transpose(0, 1)]
    ).double()


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.RandomState(0).permutation(len(raw.target))
    pixels = np.rint(raw.images[order] * (255 / 16)).astype(np.uint8)[:, None]
    images, labels = torch.from_numpy(pixels), torch.from_numpy(raw.target[order]).long()
    train, test = (LabeledImages(images[s], labels[s]) for s in (slice(1297), slice(1297, None)))
    return ImageData("digits", [str(k) for k in range(10)], train, test)


def _textures() -> ImageData:
    try:
        import skimage.data
        from PIL import Image
    except ImportError as error:
        raise DataError(f"data 'textures' needs scikit-image: {error}") from error
    folder = Path(skimage.data.__file__).parent
    missing = [f"{name}.png" for name in TEXTURES if not (folder / f"{name}.png").is_file()]
    if missing:
        raise DataError(f"this scikit-image does not bundle, in {folder}:", missing)
    parts: dict[str, list[Tensor]] = {"train": [], "test": []}
    for name in TEXTURES:
        with Image.open(folder / f"{name}.png") as file:
            picture = torch.from_numpy(np.array(file.convert("L")))
        border = int(picture.shape[1] * 0.6)  # left: train, right: test, no pixel in both
        parts["train"].append(_patches(picture[:, :border], stride=8, count=400))
        parts["test"].append(_patches(picture[:, border:], stride=16, count=60))
    train, test = (_stack(parts[part]) for part in ("train", "test"))
    return ImageData("textures", list(TEXTURES), train, test)


def _patches(picture: Tensor, stride: int, count: int) -> Tensor:
    tiles = picture.unfold(0, TEXTURE_SIZE, stride).unfold(1, TEXTURE_SIZE, stride)
    tiles = tiles.reshape(-1, 1, TEXTURE_SIZE, TEXTURE_SIZE)
    keep = torch.linspace(0, len(tiles) - 1, min(count, len(tiles))).round().long()
    return tiles[keep].contiguous()


def _stack(per_class: Sequence[Tensor]) -> LabeledImages:
    counts = torch.tensor([len(images) for images in per_class])
    return LabeledImages(
        torch.cat(list(per_class)), torch.arange(len(counts)).repeat_interleave(counts)
    )


def _folder(root: Path, resolution: int | None, val_fraction: float, seed: int) -> ImageData:
    if not root.is_dir():
        accepted = ", ".join(repr(name) for name in BUILTIN)
        raise DataError(f"data {str(root)!r} is no folder; accepted: {accepted} or an image folder")
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / n for n in ("val", "test") if (root / n).is_dir()), None)
    if train_root is root:
        test_root = None
    train_files = _class_files(train_root)
    test_files = _class_files(test_root) if test_root else {}
    problems = [] if test_root is None else _class_mismatch(train_files, test_files, test_root.name)
    for part, files in ((train_root, train_files), (test_root, test_files)):
        problems += [f"{part / name}: no image" for name, paths in files.items() if not paths]
    if test_root is None:
        problems += [
            f"{train_root / name}: one image cannot be split into train and test"
            for name, paths in train_files.items()
            if len(paths) == 1
        ]
    images, unreadable = _read(train_files, test_files, resolution)
    if problems or unreadable:
        raise DataError(f"data folder {root} cannot be used:", problems + unreadable)
    if test_root is None:
        train_files, test_files = _split(train_files, val_fraction, seed)
    classes = sorted(train_files)
    train, test = (
        _stack([torch.stack([images[path] for path in files[name]]) for name in classes])
        for files in (train_files, test_files)
    )
    return ImageData(root.resolve().name, classes, train, test)


def _class_files(root: Path) -> dict[str, list[Path]]:
    """Class name -> sorted image files; hidden names are skipped, links are followed."""
    found = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != "."):
        seen, files = set(), []
        for where, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(where)
            folders[:] = [] if real in seen else sorted(n for n in folders if n[0] != ".")
            if real not in seen:
                files += [Path(where, n) for n in names if n[0] != "."]
            seen.add(real)
        images = sorted(p for p in files if p.suffix.lower() in EXTENSIONS)
        found[unicodedata.normalize("NFC", folder.name)] = images
    if not found:
        raise DataError(f"{root} is empty: expected one folder of images per class, found none")
    if len(found) == 1:
        raise DataError(f"{root} has one class ({next(iter(found))}): at least two are needed")
    return found


def _class_mismatch(
    train: dict[str, list[Path]], test: dict[str, list[Path]], test_name: str
) -> list[str]:
    return [
        f"class {name!r} is in {'train' if name in train else test_name}/ only"
        for name in sorted(set(train) ^ set(test))
    ]


def _read(
    train: dict[str, list[Path]], test: dict[str, list[Path]], resolution: int | None
) -> tuple[dict[Path, Tensor], list[str]]:
    """Decodes every file; returns the images that could be read and what is wrong with the rest."""
    paths = [p for files in (train, test) for per_class in files.values() for p in per_class]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = dict(zip(paths, pool.map(lambda p: _decode(p, resolution), paths), strict=True))
    problems = [f"{path}: {image}" for path, image in read.items() if isinstance(image, str)]
    images = {path: image for path, image in read.items() if isinstance(image, Tensor)}
    if any(image.shape[0] == 3 for image in images.values()):
        images = {path: image.expand(3, -1, -1) for path, image in images.items()}
    sizes = sorted({tuple(image.shape[1:]) for image in images.values()})
    if resolution is None and (len(sizes) > 1 or any(h != w for h, w in sizes)):
        shown = ", ".join(f"{h}x{w}" for h, w in sizes[:4]) + (", ..." if len(sizes) > 4 else "")
        problems.append(
            f"images of {len(sizes)} sizes ({shown}): give --resolution (resolution=), e.g. 32"
        )
    return images, problems


def _decode(path: Path, resolution: int | None) -> Tensor | str:
    """One image as uint8 (C, H, W), C = 1 for grey; a text that says what is wrong otherwise."""
    from PIL import Image

    if not path.exists():
        return "link to a file that does not exist"
    try:
        with Image.open(path) as file:
            if file.mode.startswith("I;16"):  # PIL would clip 16 bits, not scale them
                image = Image.fromarray((np.array(file) >> 8).astype(np.uint8))
            elif file.mode in ("I", "F"):
                return f"image of mode {file.mode}: save it with 8 or 16 bits a channel"
            else:
                image = file.convert("L" if file.mode in ("1", "L", "LA") else "RGB")
    except Exception as error:
        return f"unreadable image ({type(error).__name__}: {error})"
    if resolution is not None and image.size != (resolution, resolution):
        scale = resolution / min(image.size)
        size = [max(resolution, round(side * scale)) for side in image.size]
        left, top = ((side - resolution) // 2 for side in size)
        image = image.resize(size, Image.Resampling.LANCZOS)
        image = image.crop((left, top, left + resolution, top + resolution))
    pixels = np.array(image)
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def _split(
    files: dict[str, list[Path]], val_fraction: float, seed: int
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    train, test = {}, {}
    for name, paths in files.items():
        key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        order = np.random.default_rng(int.from_bytes(key[:8], "little")).permutation(len(paths))
        held = min(max(1, round(val_fraction * len(paths))), len(paths) - 1)
        test[name] = [paths[i] for i in sorted(order[:held])]
        train[name] = [paths[i] for i in sorted(order[held:])]
    return train, test
