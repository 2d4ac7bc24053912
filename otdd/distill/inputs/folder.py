"""Image folders: `train/CLASS/*` with `val/` or `test/` beside it, or `CLASS/*`.

Classes are in the order of their names. Hidden files and those of the system are ignored, and so
is what is no image; images in a format that otdd does not read are problems. Links are followed.
Parts of other names (`Training/`, `valid/`) are refused where there is no `train/`, and told as not
used beside it. A folder `train/` of images alone, beside other folders of images, is a class.
"""

from __future__ import annotations

import mimetypes
import os
from pathlib import Path

import torch

from otdd.distill.inputs.listing import Files, Listing, Part
from otdd.distill.inputs.pictures import EXTENSIONS
from otdd.distill.inputs.problems import DataError, check_names, normal
from otdd.distill.inputs.table import SPLITS

PARTS = (*SPLITS, "testing")  # how parts of data sets are called, in any case
IGNORED = ("__MACOSX", "@eaDir", "lost+found")
OTHER_IMAGES = (".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd", ".dng", ".cr2", ".nef", ".arw")
OF_DATASETS = ("dataset_dict.json", "dataset_info.json", "*.parquet", "data/*.parquet", "*.arrow")


def list_folder(root: Path) -> Listing:
    """Lists a folder; nothing is opened.

    Raises:
        DataError: it does not hold at least two class folders.
    """
    train_root, test_root = _roots(root)
    problems: list[str] = []
    train = _class_files(root, train_root, problems)
    test = _class_files(root, test_root, problems) if test_root else None
    _, notes = check_names([*train, *(test or {})])
    classes = sorted({*train, *(test or {})})
    parts = [_part(root, classes, files) for files in (train, test) if files is not None]
    return Listing(
        where=f"data folder {root}",
        name=root.resolve().name,
        classes=classes,
        train=parts[0],
        test=parts[1] if test is not None else None,
        test_name=f"{test_root.name}/" if test_root else "test",
        problems=problems,
        notes=[*_unused(root, train_root, test_root), *notes],
    )


def in_parts(root: Path) -> bool:
    """Whether the folders of a data folder are its parts; else they are its classes."""
    if not (root / "train").is_dir():
        return False
    others = [folder for folder in _folders(root) if folder.name.casefold() not in PARTS]
    return bool(_folders(root / "train")) or not any(map(_has_images, others))


def _roots(root: Path) -> tuple[Path, Path | None]:
    """Folders of the training classes, and of the test classes if they have one."""
    if in_parts(root):
        return root / "train", next(
            (root / n for n in ("val", "test") if (root / n).is_dir()), None
        )
    names = [folder.name for folder in _folders(root)]
    if names and all(name.casefold() in PARTS for name in names):
        raise DataError(
            f"{root} has parts of a data set where classes are expected: {', '.join(names)}; "
            f"call them train and val, or train and test{_hint(root)}"
        )
    return root, None


def _unused(root: Path, train_root: Path, test_root: Path | None) -> list[str]:
    """A note of the images that are in neither part."""
    if train_root == root:
        return []
    used = [train_root, *([test_root] if test_root else [])]
    left = [f.name for f in _folders(root) if f not in used and _has_images(f)]
    beside = " and ".join(f"{folder.name}/" for folder in used)
    return [f"folders beside {beside} are not used: {', '.join(left)}"] if left else []


def _folders(where: Path) -> list[Path]:
    inside = (p for p in where.iterdir() if p.is_dir() and p.name[0] != ".")
    return sorted(p for p in inside if p.name not in IGNORED)


def _has_images(folder: Path) -> bool:
    return any(p.suffix.lower() in EXTENSIONS for p in folder.rglob("*"))


def _part(root: Path, classes: list[str], files: dict[str, list[Path]]) -> Part:
    counts = torch.tensor([len(files.get(name, ())) for name in classes])
    paths = [path for name in classes for path in files.get(name, ())]
    return Part(Files(paths, root), torch.arange(len(counts)).repeat_interleave(counts))


def _class_files(root: Path, where: Path, problems: list[str]) -> dict[str, list[Path]]:
    """Class name -> sorted image files; adds to the problems."""
    folders = _folders(where)
    if not folders:
        loose = sum(p.suffix.lower() in EXTENSIONS for p in where.iterdir())
        raise DataError(
            f"{where} is empty: expected one folder of images per class, found "
            + (f"{loose} images outside any" if loose else "none")
            + _hint(root)
        )
    problems += [f"{where}: {problem}" for problem in check_names(p.name for p in folders)[0]]
    if len(folders) == 1:
        raise DataError(
            f"{where} has one class ({folders[0].name}): at least two are needed{_hint(root)}"
        )
    found = {normal(folder.name): _files(folder, problems) for folder in folders}
    if _hint(root) and not all(found.values()):
        problems.append(f"{root} has folders without an image{_hint(root)}")
    return found


def _files(folder: Path, problems: list[str]) -> list[Path]:
    def unlisted(error: OSError) -> None:
        problems.append(f"{error.filename}: cannot be listed ({error.strerror})")

    seen, files = set(), []
    for where, folders, names in os.walk(folder, onerror=unlisted, followlinks=True):
        real = os.path.realpath(where)
        folders[:] = [] if real in seen else sorted(n for n in folders if n[0] != ".")
        if real not in seen:
            files += [Path(where, n) for n in names if n[0] != "."]
        seen.add(real)
    for path in sorted(files):
        if _other_image(path):
            problems.append(f"{path}: {path.suffix} is not read; accepted: {', '.join(EXTENSIONS)}")
    return sorted(p for p in files if p.suffix.lower() in EXTENSIONS)


def _other_image(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix in EXTENSIONS or suffix in OTHER_IMAGES:
        return suffix in OTHER_IMAGES
    return (mimetypes.guess_type(path.name)[0] or "").startswith("image/")


def _hint(root: Path) -> str:
    there = any(next(root.glob(pattern), None) for pattern in OF_DATASETS)
    return f"; for a Hugging Face data set give it as hf:{root}" if there else ""
