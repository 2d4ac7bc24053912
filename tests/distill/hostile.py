"""Inputs that mean harm or no sense, and random ones: rows of what came of them.

Helper of test_hostile and of benchmarks/faults.py.
"""

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from distill.campaigns import REFUSED, Row, _row, _tree
from distill.faults import photos
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import otdd
from otdd import cli
from otdd.distill.data import DataError, load_data
from otdd.distill.generator import Generator, GeneratorError
from otdd.distill.store import Store, StoreError
from otdd.distill.stream import open_stream

GOOD = "accepted"
TOUCHED = "touched"  # a file that hostile code would make


def pickled(path: Path) -> bytes:
    """A pickle that makes a file when it is loaded."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {path}",)

    return pickle.dumps(Evil())


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG file that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def _postscript(touched: Path) -> bytes:
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({touched}) (w) file\n".encode()


def bad_image(kind: str, path: Path, touched: Path) -> None:
    """Put an image that is none at a path."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link to nothing":
        path.symlink_to("nothing")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(
            {
                "bomb of 100000x100000": png(100_000, 100_000),
                "bomb of 2^31 columns": png(2**31 - 1, 1),
                "bomb of zeros": png(30_000, 30_000, bytes(10**6)),
                "12000x12000 without pixels": png(12_000, 12_000),
                "PostScript": _postscript(touched),
                "pickle": pickled(touched),
                "empty": b"",
                "control codes in the name": b"",
            }[kind]
        )


IMAGES = (
    *("bomb of 100000x100000", "bomb of 2^31 columns", "bomb of zeros"),
    *("12000x12000 without pixels", "PostScript", "pickle", "empty", "pipe", "link to a device"),
    *("link to itself", "link to nothing", "folder", "control codes in the name"),
)


def bad_images(root: Path) -> list[Row]:
    """Files in a data folder that are no images, by both readers."""
    rows = []
    for kind in IMAGES:
        shutil.rmtree(root, ignore_errors=True)
        photos(root / "photos")
        name = "\x1b[2J\nx.png" if kind.startswith("control") else "x.png"
        path = root / "photos/train/été" / name
        bad_image(kind, path, root / TOUCHED)
        for reader in ("load_data", "encode"):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    if reader == "load_data":
                        load_data(root / "photos", resolution=8)
                    else:
                        stream = open_stream(root / "photos", resolution=8)
                        list(stream.batches(8))
                outcome, ok, said = "fault", kind == "folder", "accepted"
            except DataError as error:
                said = str(error)
                lines = said.splitlines()
                ok = sum("x.png" in line for line in lines) == 1 and len(said) < 1000
                ok = ok and all(line.isprintable() for line in lines)
            ok = ok and not (root / TOUCHED).exists()
            outcome = GOOD if kind == "folder" else REFUSED
            rows.append(_row("image", f"{kind}, {reader}", outcome, ok, said))
    return rows


CLASS_NAMES = {
    "..%2f": False,  # hidden, so not seen: one class is left
    "a..%2f..%2fetc": True,
    "<script>alert(1)": True,
    "a|b`*_[x](y)": True,
    "é" * 120: True,
    "con": True,
    "-rf": True,
    " ": False,
    "'; drop table": True,
    "{{7*7}}": True,
    "line\nend": False,
    "\x1b[31mred": False,
    os.fsdecode(b"\xff\xfe"): False,
}


def _plain(said: str) -> bool:
    return all(line.isprintable() for line in said.splitlines())


def class_names(root: Path) -> list[Row]:
    """Names of class folders: content of files, never a part of a path."""
    from distill.finished_run import written_set

    from otdd.distill.export import FORMATS, export

    rows = []
    for number, (name, accepted) in enumerate(CLASS_NAMES.items()):
        base = root / str(number)
        shutil.rmtree(base, ignore_errors=True)
        photos(base / "photos")
        for part in ("train", "val"):
            os.rename(base / "photos" / part / "été", base / "photos" / part / name)
        try:
            classes = load_data(base / "photos").classes
            seen, said = True, classes
        except DataError as error:
            seen, said = False, str(error)
        shown = ascii(name)[:40]
        ok = seen == accepted and (name in said if accepted else _plain(said))
        rows.append(_row("class name", shown, GOOD if accepted else REFUSED, ok, said))
        if not accepted:
            continue
        written_set(base / "set", classes)
        before = _tree(base)
        for to in FORMATS:
            export(base / "set", to, base / "out" / to)
        made = {k: v for k, v in _tree(base).items() if not k.startswith("out")}
        back = otdd.load(base / "out/hf").classes == classes
        card = (base / "out/hf/README.md").read_text(encoding="utf-8").split("---", 2)[2]
        ok = made == before and back and "<script" not in card
        rows.append(_row("class name, exported", shown, GOOD, ok, (back, set(made) ^ set(before))))
        shutil.rmtree(base)
    return rows


def strange_folders(root: Path) -> list[Row]:
    """Loops of links, two spellings of one class, and devices in a data folder."""
    rows = []
    photos(root / "loop/photos")
    (root / "loop/photos/train/été/again").symlink_to(root / "loop/photos/train")
    (root / "loop/photos/train/été/self").symlink_to("self")
    count = len(load_data(root / "loop/photos").train)
    rows.append(_row("folder", "loop of links", GOOD, count == 30, count))
    photos(root / "twice/photos")
    shutil.copytree(root / "twice/photos/train/été", root / "twice/photos/train/e\u0301te\u0301")
    with contextlib.suppress(DataError):
        load_data(root / "twice/photos")
        return [*rows, _row("folder", "one class spelled twice", REFUSED, False, "accepted")]
    return [*rows, Row("folder", "one class spelled twice", REFUSED)]


def _laughs(depth: int) -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, depth)]
    return "\n".join([*lines, f"data: *a{depth - 1}"])


def yaml_files(touched: Path) -> dict[str, str]:
    """Texts of YAML files that are to be refused."""
    return {
        "python tag": f"data: !!python/object/apply:os.system ['touch {touched}']",
        "python name": "data: !!python/name:os.system",
        "billion laughs": _laughs(12),
        "holds itself": "data: &a [*a]",
        "deep": "data: " + "[" * 20_000,
        "huge integer": "ipc: " + "9" * 10_000,
        "no date": "data: 2001-99-99",
        "zero character": 'data: "a\\0b"\nipc: 1\nout: x',
        "list": "[1, 2]",
        "two documents": "a: 1\n---\nb: 2",
        "control codes": 'data: digits\nipc: 1\nout: x\n"\\e[2J\\nx": 1',
        "unknown setting": "colour: blue",
        "binary": "\x00\x01\x02",
        "long text": "preset: " + "x" * 10**6,
    }


def bad_yaml(root: Path) -> list[Row]:
    """YAML files given to the command."""
    rows = []
    (root / "work").mkdir(parents=True, exist_ok=True)
    for kind, text in yaml_files(root / TOUCHED).items():
        (root / "f.yaml").write_text(text)
        code, said = called(["run", "--config", str(root / "f.yaml")])
        ok = code == 2 and refusal(said) and not (root / TOUCHED).exists()
        rows.append(_row("YAML", kind, REFUSED, ok, (code, said[:500])))
    return rows


def safetensors_files() -> dict[str, bytes]:
    """Files whose header lies."""

    def made(header: object, data: bytes = b"") -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    def tensor(shape: list[int], ends: list[int], kind: str = "F32") -> dict:
        return {"x": {"dtype": kind, "shape": shape, "data_offsets": ends}}

    return {
        "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
        "header longer than the file": struct.pack("<Q", 10**6) + b"{}",
        "no JSON": made(b"{" * 50),
        "deep JSON": made(b'{"a":' * 5000),
        "shape that overflows": made(tensor([2**33, 2**33], [0, 4]), b"0000"),
        "more than there is": made(tensor([2**40], [0, 2**42]), b"0000"),
        "less than its shape": made(tensor([4], [0, 4]), b"0000"),
        "offsets backwards": made(tensor([1], [4, 0]), b"0000"),
        "unknown type": made(tensor([1], [0, 4], "EVIL"), b"0000"),
        "our part is no JSON": made({"__metadata__": {"otdd": "{"}}),
        "our part is a number": made({"__metadata__": {"otdd": "7"}}),
        "a foreign generator": made({"__metadata__": {"otdd": json.dumps({"format": 1})}}),
        "a generator of no sense": made(
            {"__metadata__": {"otdd": json.dumps({"format": 1, "transformer": [], "codec": 3})}}
        ),
    }


def bad_safetensors(root: Path) -> list[Row]:
    """Lying headers, as a generator and as a file of the store."""
    rows = []
    root.mkdir(parents=True, exist_ok=True)
    for kind, data in safetensors_files().items():
        (root / "g.safetensors").write_bytes(data)
        try:
            Generator.load(root / "g.safetensors")
            ok, said = False, "accepted"
        except GeneratorError as error:
            said = str(error)
            ok = "\n" not in said and "g.safetensors" in said
        rows.append(_row("safetensors, generator", kind, REFUSED, ok, said))
        try:
            Store(root).read_tensors("g.safetensors")
            Store(root).read_meta("g.safetensors")
            ok = "our part" in kind or "generator" in kind
        except StoreError as error:
            ok = "g.safetensors" in str(error)
        rows.append(_row("safetensors, store", kind, REFUSED, ok))
    return rows


def bad_pickles(root: Path) -> list[Row]:
    """Pickles wherever weights, arrays or labels are read."""
    from distill.tiny import dit_pipeline

    from otdd.distill.config import ConfigError
    from otdd.distill.students import load_checkpoint

    root.mkdir(parents=True, exist_ok=True)
    evil, data, rows = pickled(root / TOUCHED), load_data("digits"), []
    for name in ("t.pt", "t.pth", "t.bin", "t.safetensors"):
        (root / name).write_bytes(evil)
        with contextlib.suppress(ConfigError):
            load_checkpoint("convnet", root / name, data)
            rows.append(Row("pickle", f"teacher {name}", "fault", "accepted"))
            continue
        ok = not (root / TOUCHED).exists()
        rows.append(_row("pickle", f"teacher {name}", REFUSED, ok, "it ran"))
    for part in ("transformer", "vae"):
        dit_pipeline().save_pretrained(root / part)
        for file in (root / part / part).glob("*.safetensors"):
            file.unlink()
            file.with_suffix(".bin").write_bytes(evil)
        with contextlib.suppress(GeneratorError):
            Generator.load(root / part)
            rows.append(Row("pickle", f"generator's {part}", "fault", "accepted"))
            continue
        ok = not (root / TOUCHED).exists()
        rows.append(_row("pickle", f"generator's {part}", REFUSED, ok, "it ran"))
    return rows


def called(arguments: list[str]) -> tuple[int, str]:
    """Exit code of a command, and what it says on standard error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = cli._guarded(arguments)
        except SystemExit as end:  # --help
            code = end.code or 0
    return code, said.getvalue()


def refusal(said: str) -> bool:
    """Whether a text is one short line that prints."""
    return said.startswith("otdd: ") and said.count("\n") == 1 and said.strip().isprintable()


WORDS = (
    *(
        "data",
        "ipc",
        "out",
        "seeds",
        "seed",
        "sets",
        "resolution",
        "generator",
        "latents",
        "preset",
    ),
    *("sample", "relabel", "train", "guidance", "influence", "diversity", "modes", "steps", "lr"),
    *("strength", "window", "epochs", "batch", "archs", "losses", "teachers", "tau", "crop_scale"),
    *("starts", "order", "scheduler", "surrogate", "top_k", "label_format", "reference_size"),
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-5, 5)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["digits", "convnet", "otg", "random", "on", "off", "paper", "1e-3", "ddim"])
    | st.sampled_from([10**30, -(10**30), float("nan"), float("inf"), "", "\x00", "é\n", "../x"])
)


def nests(inner):
    return st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=8), inner, max_size=4)


VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | nests(inner), max_leaves=8
)
FLAGS = st.lists(
    st.tuples(
        st.sampled_from([f"--{w}" for w in WORDS])
        | st.sampled_from(["--sample.steps", "--train.lr", "--sample.guidance.strength", "--debug"])
        | st.text(max_size=8),
        st.integers().map(str)
        | st.floats().map(str)
        | st.text(max_size=12)
        | st.sampled_from(["", "digits", "nan", "1e999", "--", "-1", "\x00", "{}", "None"]),
    ),
    max_size=5,
)
COMMANDS = (
    "run",
    "sample",
    "train",
    "evaluate",
    "fit",
    "fit-surrogate",
    "encode",
    "export",
    "push",
)


def fuzzed_settings(root: Path, count: int) -> list[Row]:
    """Random YAML files with valid settings beneath, by --dry-run."""
    import yaml

    rows = []
    base = {"data": "digits", "ipc": 1, "out": "out"}
    where = _emptied(root / "work")

    @settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(nest=nests(VALUES), needed=st.booleans())
    def once(nest, needed):
        given_values = {**base, **nest} if needed else nest
        (root / "f.yaml").write_text(yaml.dump(given_values, allow_unicode=True), encoding="utf-8")
        with _inside(where):
            code, said = called(["run", "--dry-run", "--config", str(root / "f.yaml")])
        ok = code == 0 or (code in (1, 2) and refusal(said))
        ok = ok and "failed:" not in said and not any(where.iterdir())
        rows.append(_row("settings", "YAML", GOOD if code == 0 else REFUSED, ok, (nest, said)))

    once()
    return rows


def fuzzed_flags(root: Path, count: int) -> list[Row]:
    """Random flags of every command, always with something that it refuses."""
    rows = []
    where = _emptied(root / "work")

    @settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(command=st.sampled_from(COMMANDS), flags=FLAGS)
    def once(command, flags):
        flat = [part for pair in flags for part in pair]
        with _inside(where):
            code, said = called([command, *flat, "--no-such-flag"])
        helps = code == 0 and {"-h", "--help"} & set(flat)
        ok = helps or (code == 2 and (refusal(said) or "--debug" in flat))
        ok = ok and not any(where.iterdir())
        rows.append(_row("flags", command, REFUSED, ok, (command, flat, code, said)))

    once()
    return rows


def fuzzed_images(root: Path, count: int, seed: int = 0) -> list[Row]:
    """Image files with bytes changed, cut off or put in, in a data folder."""
    draw, rows = random.Random(seed), []
    originals = {}
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for kind in ("png", "jpeg", "bmp", "ppm", "tiff", "webp"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=kind.upper())
        originals[kind] = buffer.getvalue()
    folder = _emptied(root / "photos")
    photos(folder)
    before = _tree(root)
    for number in range(count):
        kind = list(originals)[number % len(originals)]
        data = bytearray(originals[kind])
        for _ in range(draw.choice((1, 1, 2, 8))):
            at, what = draw.randrange(len(data)), draw.randrange(4)
            if what == 0:
                data[at] = draw.randrange(256)
            elif what == 1:
                del data[at : at + draw.randrange(1, 20)]
            elif what == 2:
                data[at:at] = draw.randbytes(draw.randrange(1, 20))
            else:
                del data[at:]
            data = data or bytearray(b"x")
        path = folder / "train/été" / f"x.{kind}"
        path.write_bytes(data)
        try:
            load_data(folder, resolution=8)
            ok, outcome, said = True, GOOD, ""
        except DataError as error:
            said = str(error)
            ok, outcome = f"x.{kind}" in said and len(said.splitlines()) == 2, REFUSED
        path.unlink()
        rows.append(_row("image", kind, outcome, ok, said))
    if _tree(root) != before:
        rows.append(Row("image", "all", "fault", "something was written"))
    return rows


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


_inside = contextlib.chdir
