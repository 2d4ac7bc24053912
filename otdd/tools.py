"""Commands beside the stages: before a data set is distilled, and with what came of it.

What a command needs is imported when it runs; all settings are checked before any work.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from otdd.distill.config import ConfigError, require, require_path
from otdd.distill.words import counted, sized
from otdd.flags import Log, parse


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Flags that these commands share."""

    data: str
    """digits, textures, an image folder (CLASS/*, or train/CLASS/* and val/ or test/), a table of
    paths and labels (.csv, .tsv, .parquet), an .npz file, or a Hugging Face data set (hf:FOLDER,
    hf:OWNER/NAME). Settings of the input follow it: photos.csv,label_column=breed or
    hf:OWNER/NAME,streaming=true."""
    out: str
    """What is written; an interrupted command continues there."""
    resolution: int | None = None
    """Side of the images in pixels, 4 to 4096; by default that of the data."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read."""
    dry_run: bool = False
    """Check everything, time some steps, print what it takes, and write nothing."""
    log: Log = "auto"
    """What is told while it works, on standard error; auto: bars on a terminal, else lines."""
    quiet: bool = False
    """The same as --log quiet."""
    debug: bool = False
    """Show the stack trace of an error."""


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """Flags of `otdd export`."""

    dir: str
    """Folder of a run, or of an earlier export; the flag may be left out."""
    to: Literal["hf", "imagefolder", "npz", "webdataset", "ddranking"]
    """Format: a Hugging Face data set, an ImageFolder, NumPy arrays, tar files of WebDataset, or
    tensors for DD-Ranking."""
    out: str
    """The new folder; an empty one is accepted."""
    set: str | None = None
    """Name of the set; by default otg, or the one of an exported folder."""
    license: str | None = None
    """Licence that the card names, as the Hugging Face Hub spells it (cc-by-4.0, mit, ...); by
    default that of an exported folder, else unknown."""
    debug: bool = False
    """Show the stack trace of an error."""


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Flags of `otdd report`."""

    dir: tuple[str, ...]
    """Folder of a run, finished or not; the flag may be left out. Several folders: runs of the same
    data, side by side."""
    out: str | None = None
    """Folder for index.html and the figures as PNG files, by default DIR/report; or a file that
    ends in .html, for the page alone. An earlier report is replaced. Several runs need it."""
    classes: int = 20
    """Most classes whose images, costs and maps are shown, the first ones of the data."""
    pdf: bool = False
    """Figures as PDF files too, but for the grid of images."""
    log: Log = "auto"
    """What is told while it works, on standard error; auto: bars on a terminal, else lines."""
    quiet: bool = False
    """The same as --log quiet."""
    debug: bool = False
    """Show the stack trace of an error."""


@dataclass(frozen=True, kw_only=True)
class PushFlags:
    """Flags of `otdd push`."""

    dir: str
    """Folder made by `otdd export --to hf`; the flag may be left out."""
    repo_id: str
    """Data set repository, OWNER/NAME, made where there is none; the flag may be left out."""
    private: bool = False
    """A new repository is private."""
    dry_run: bool = False
    """Print what would be sent, and send nothing; needs neither network nor token."""
    debug: bool = False
    """Show the stack trace of an error."""


def _flags(cls: type, flags: list[str], prog: str, about: str) -> Any:
    """Flags of a command that works on data, its output not among the classes of them."""
    given = parse(cls, flags, prog, about, {})
    require(bool(given.data), "data", given.data, "a data set name or a folder")
    require(bool(given.out), "out", given.out, "where to write")
    require_path(given.data, "data")
    require_path(given.out, "out")
    from otdd.distill.prepare import outside

    outside(given.out, given.data)
    return given


def flags_class(command: str) -> type:
    """The flags of a command, as a dataclass."""
    made = {"fit": _fit_flags, "fit-surrogate": _surrogate_flags, "encode": _encode_flags}
    plain = {"export": ExportFlags, "report": ReportFlags, "push": PushFlags}
    return made[command]() if command in made else plain[command]


def _fit_flags() -> type:
    from otdd.distill.fit_config import FitConfig

    @dataclass(frozen=True, kw_only=True)
    class FitFlags(FitConfig, DataFlags):
        """Flags of `otdd fit`."""

        out: str
        """File of the generator, such as photos.safetensors, with --from the folder of a pipeline;
        an interrupted training continues there."""
        base: str | None = field(default=None, metadata={"flag": "from"})
        """Folder of a DiTPipeline to train further, on the classes of the data; by default a small
        generator is trained from scratch."""
        device: Literal["cpu", "cuda"] = "cpu"
        """Where the model is trained."""

    return FitFlags


def _surrogate_flags() -> type:
    from otdd.distill.surrogate_config import SurrogateConfig

    @dataclass(frozen=True, kw_only=True)
    class SurrogateFlags(SurrogateConfig, DataFlags):
        """Flags of `otdd fit-surrogate`."""

        out: str
        """Folder of the networks; an interrupted training continues there."""

        device: Literal["cpu", "cuda"] = "cpu"
        """Where the network is trained."""

    return SurrogateFlags


def _encode_flags() -> type:
    from otdd.distill.encode_config import EncodeConfig

    @dataclass(frozen=True, kw_only=True)
    class EncodeFlags(EncodeConfig, DataFlags):
        """Flags of `otdd encode`."""

        out: str
        """Folder of the latents; an interrupted encoding continues there."""
        generator: str | None = None
        """Generator whose codec encodes; by default the one shipped for the data."""
        device: Literal["cpu", "cuda"] = "cpu"
        """Where the codec runs."""

    return EncodeFlags


def fit(flags: list[str]) -> int:
    """`otdd fit`."""
    about = "Train a class-conditional generator; an interrupted training continues."
    given = _flags(_fit_flags(), flags, "otdd fit", about)
    import time

    from otdd.terminal import shown

    _check_use(given)
    if given.base is None and Path(given.out).is_dir():
        raise ConfigError(f"--out: {given.out} is a folder; expected a file to write")
    data, train, check = _training(given)
    from otdd.distill import costs

    if given.dry_run:
        check(given.out)
        cost = costs.fitting(train, given.steps)
        sys.stdout.write(_found(data, data.train))
        sys.stdout.write(costs.lines(f"fit      {given.steps} steps of {given.batch} images", cost))
        return 0
    finished = Path(given.out).exists()  # of another training it is refused
    since, cpu = time.perf_counter(), time.process_time()
    with shown(given.log, given.quiet, {"fit": "steps"}) as progress:
        made = train(given.out, progress=progress)
    wall, cpu = time.perf_counter() - since, time.process_time() - cpu
    loss, trained, weights = (made.info[k] for k in ("loss", "trained", "weights"))
    what = f"loss {loss:.4f}; {trained:,} of {weights:,} weights trained"
    if finished:
        sys.stdout.write(f"{given.out} is finished already: {what}\n")
        return 0
    sys.stdout.write(
        f"written to {given.out}: {what} in {wall / 60:.1f} min, {cpu / 60:.1f} min of processor "
        f"time, peak memory {costs.peak_memory() / 2**30:.2f} GiB\n"
    )
    return 0


def _check_use(given: Any) -> None:
    """Refuses settings of the other way of training, which would do nothing."""
    from otdd.distill.fit_config import FitConfig

    unused = ("tune", "rank") if given.base is None else ("width", "layers", "patch_size")
    for name in unused:
        seen, default = getattr(given, name), getattr(FitConfig, name)
        how = "without" if given.base is None else "with"
        require(seen == default, name, seen, f"{default!r}, the default, {how} --from")


def _training(given: Any) -> tuple[Any, Callable[..., Any], Callable[[str], None]]:
    """The data, the training as a function of --out and progress, and the check of an --out."""
    from otdd.distill import fit, tune
    from otdd.distill.data import BUILTIN, load_data
    from otdd.distill.fit_config import FitConfig
    from otdd.distill.workers import local_device

    config, device = _only(FitConfig, given), local_device(given.device, "--device")
    base = tune.load_base(given.base) if given.base is not None else None
    side = None if base is None or given.data in BUILTIN else base.image_shape[1]
    data = load_data(given.data, **{**_reading(given), "resolution": given.resolution or side})
    if base is None:
        train = functools.partial(fit.fit, data, config, device=device)
        return data, train, functools.partial(fit.check_out, data, config)
    train = functools.partial(tune.tune, data, base, config, device=device)
    return data, train, functools.partial(tune.check_out, data, base, config)


def fit_surrogate(flags: list[str]) -> int:
    """`otdd fit-surrogate`."""
    about = "Train the networks of influence guidance; an interrupted training continues."
    given = _flags(_surrogate_flags(), flags, "otdd fit-surrogate", about)
    from otdd.distill.data import load_data
    from otdd.distill.surrogate import fit_surrogate
    from otdd.distill.surrogate_config import SurrogateConfig
    from otdd.distill.workers import local_device
    from otdd.terminal import shown

    config, device = _only(SurrogateConfig, given), local_device(given.device, "--device")
    data = load_data(given.data, **_reading(given))
    if given.dry_run:
        from otdd.distill import costs
        from otdd.distill.store import Store
        from otdd.distill.surrogate import identity

        Store(given.out).check(identity(data, config))
        timed = costs.surrogate(data, config, given.device)
        sys.stdout.write(_found(data, data.train))
        sys.stdout.write(costs.lines(f"train    {given.arch}, {given.epochs} epochs", timed))
        return 0
    with shown(given.log, given.quiet) as bars:
        made = fit_surrogate(data, config, given.out, device=device, progress=bars)
    reached = ", ".join(f"{c['accuracy']:.1f} % (epoch {c['epoch']})" for c in made["checkpoints"])
    sys.stdout.write(f"written to {given.out}: test accuracy {reached}\n")
    return 0


def encode(flags: list[str]) -> int:
    """`otdd encode`."""
    about = "Encode the training images once; an interrupted encoding continues."
    given = _flags(_encode_flags(), flags, "otdd encode", about)
    from otdd import _torchvision
    from otdd.distill.encode import encode
    from otdd.distill.encode_config import EncodeConfig
    from otdd.distill.stream import open_stream
    from otdd.distill.workers import local_device
    from otdd.terminal import shown

    config, device = _only(EncodeConfig, given), local_device(given.device, "--device")
    data = open_stream(given.data, seed=given.seed, decode_all=given.dry_run, **_reading(given))
    _torchvision.repair()
    from otdd.distill.generator import load_generator

    codec = load_generator(given.generator, data).codec
    if given.dry_run:
        from otdd.distill import costs
        from otdd.distill.encode import identity
        from otdd.distill.store import Store

        Store(given.out).check(identity(data, codec, config))
        codec.to(device)
        cost = costs.encoding(data, codec, config.batch)
        latent = codec.latent_shape(data.image_shape)
        size = sized(2 * len(data) * math.prod(latent))
        shape = "x".join(map(str, latent))
        about = f"encode   {len(data)} images to latents of {shape}, {size} of disk"
        sys.stdout.write(_found(data, data))
        sys.stdout.write(costs.lines(about, cost))
        return 0
    codec.to(device)
    units = {"encode": "images", "check": "images", "statistics": "classes"}
    with shown(given.log, given.quiet, units) as pace:
        made = encode(data, codec, config, given.out, progress=pace)
    size = sized(sum(f.stat().st_size for f in Path(given.out).glob("latents-*")))
    shape = "x".join(map(str, made.latent_shape))
    sys.stdout.write(f"written to {given.out}: {len(made)} latents of {shape}, {size}\n")
    return 0


def export(flags: list[str]) -> int:
    """`otdd export`."""
    about = "Write a distilled set in the format of others, into a new folder."
    given = parse(ExportFlags, flags, "otdd export", about, {}, ("dir",))
    require_path(given.dir, "dir")
    require_path(given.out, "out")
    from otdd.distill.export import export

    made = export(given.dir, given.to, given.out, set=given.set, license=given.license)
    files = [f for f in Path(given.out).rglob("*") if f.is_file()]
    size = sized(sum(f.stat().st_size for f in files))
    soft = "no soft labels"
    if made.has_soft_labels:
        soft = f"soft labels of {counted(made.epochs, 'epoch')}"
    sys.stdout.write(
        f"written to {given.out}: set {made.name}, {len(made)} images in {len(made.classes)} "
        f"classes, {soft}; {counted(len(files), 'file')}, {size}\n"
    )
    licence = json.loads((Path(given.out) / "otdd.json").read_text(encoding="utf-8"))["license"]
    sys.stdout.write(_licence(licence, "with --license"))
    return 0


def report(flags: list[str]) -> int:
    """`otdd report`."""
    about = "Write a run, or several side by side, as one HTML page that needs nothing else."
    given = parse(ReportFlags, flags, "otdd report", about, {}, ("dir",))
    require(len(given.dir) > 0, "dir", given.dir, "the folder of a run")
    for folder in given.dir:
        require_path(folder, "dir")
    require_path(given.out, "out")
    from otdd.distill.report import report, report_several
    from otdd.terminal import shown

    how: dict[str, Any] = {"classes": given.classes, "pdf": given.pdf}
    with shown(given.log, given.quiet) as bars:
        if len(given.dir) == 1:
            page = report(given.dir[0], given.out, **how, progress=bars)
        elif given.out is None:
            raise ConfigError("--out: give a folder or a .html file for a page of several runs")
        else:
            page = report_several(given.dir, given.out, **how)
    sys.stdout.write(f"written to {page}\n")
    return 0


def push(flags: list[str]) -> int:
    """`otdd push`."""
    about = "Send an exported set to the Hugging Face Hub (token: `hf auth login` or HF_TOKEN)."
    given = parse(PushFlags, flags, "otdd push", about, {}, ("dir", "repo_id"))
    require_path(given.dir, "dir")
    from otdd.distill.push import push

    sent = push(given.dir, given.repo_id, private=given.private, dry_run=given.dry_run)
    if given.dry_run:
        for name, size in sent.files.items():
            sys.stdout.write(f"{size:>12,}  {name}\n")
    total = f"{counted(len(sent.files), 'file')}, {sized(sum(sent.files.values()))}"
    where = f"{total}, to the data set {sent.repo_id}"
    sys.stdout.write(f"would send {where}\n" if given.dry_run else f"sent {where}: {sent.url}\n")
    sys.stdout.write(_licence(sent.license, "in the head of its README.md (license: ...)"))
    return 0


def _licence(name: str, where: str) -> str:
    """The licence of a set that is passed on, and where to name one."""
    return f"licence  {name}" + f"; name one {where}" * (name == "unknown") + "\n"


def _reading(given: DataFlags) -> dict[str, Any]:
    """How the data is to be read."""
    return {"resolution": given.resolution, "skip_bad_images": given.skip_bad_images}


def _found(data: Any, train: Sized) -> str:
    """What a --dry-run has found."""
    test = "" if data.test is None else f" and {len(data.test)} test"
    shape = "x".join(map(str, data.image_shape))
    count = f"{len(data.classes)} classes, {len(train)} training{test} images of {shape}"
    return f"data     {data.name}: {count}\n"


def _only(cls: type, given: Any) -> Any:
    """The settings among all flags."""
    return cls(**{f.name: getattr(given, f.name) for f in dataclasses.fields(cls)})
