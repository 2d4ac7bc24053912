"""The settings of a run and its stages, as frozen dataclasses.

Nothing here imports torch, so that the command line can parse and refuse quickly. Every class
checks itself when it is made; an error names the key, the value and what is accepted.
`otdd.distill.settings` makes these objects from flags and YAML files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Final, Literal

from otdd.distill.guidance_config import (
    ConfigError,
    DiversityConfig,
    GuidanceConfig,
    InfluenceConfig,
    ModeConfig,
    printable,
    require,
    require_kinds,
)
from otdd.distill.presets import PRESETS
from otdd.distill.protocols import PROTOCOLS

__all__ = [
    "LOSSES",
    "PRESETS",
    "PROTOCOLS",
    "SETS",
    "ConfigError",
    "DiversityConfig",
    "GuidanceConfig",
    "InfluenceConfig",
    "ModeConfig",
    "RelabelConfig",
    "RunConfig",
    "SampleConfig",
    "TrainConfig",
    "printable",
    "require",
    "require_path",
]

SETS: Final = ("otg", "unguided", "random", "kmeans", "kmeans-real")
LOSSES: Final = ("ce", "ce-plain", "kl", "mse", "otm")
FEW: Final = 10  # classes up to which `batch_few` holds
# What pictures and tables call them.
TITLES = {
    "otg": "OT-guided",
    "unguided": "unguided",
    "random": "random real",
    "kmeans": "k-means centroids",
    "kmeans-real": "k-means, nearest real",
}
# Okabe and Ito's palette for colour-blind readers: what of it stands out on white and on black.
COLOURS = {
    "otg": "#d55e00",
    "unguided": "#0072b2",
    "random": "#7f7f7f",
    "kmeans": "#009e73",
    "kmeans-real": "#cc79a7",
}
HEADINGS = {
    "ce": "hard, CE",
    "ce-plain": "hard, plain",
    "kl": "soft, KL",
    "mse": "soft, MSE",
    "otm": "soft, OTM",
}


def require_some(values: tuple[str, ...], key: str, accepted: str) -> None:
    """Raise a `ConfigError` unless there is at least one value and none twice."""
    require(len(values) >= 1, key, values, accepted)
    require(len(set(values)) == len(values), key, values, f"{accepted}, each once")


def require_path(path: str | None, key: str) -> None:
    """Raise a `ConfigError` if no file system has such a name."""
    require(path is None or isinstance(path, str), key, path, "a text")  # settings of a file
    require(path != "", key, path, "the name of a file or a folder")
    parts = (path or "").split("/")
    ok = all("\0" not in part and len(os.fsencode(part)) <= 255 for part in parts)
    require(ok, key, path, "a path of names of at most 255 bytes, without zero characters")


@dataclass(frozen=True)
class SampleConfig:
    """Stage 1: sampling the images."""

    scheduler: Literal["ddim", "ddpm", "dpm++"] = "ddim"
    """Sampler of the diffusion model."""
    steps: int = 25
    """Denoising steps of a sampling."""
    guidance_scale: float = 2.0
    """Factor of classifier-free guidance; 1: none, at half the time."""
    starts: int = 4
    """Guided samplings of a class (of order joint) from different noise; the one of least transport
    cost is kept, as k-means keeps the best of its starts."""
    judge: Literal["auto", "teachers", "latents"] = "auto"
    """Whether that cost is of the logits that the teachers of the run see in images, or of latents;
    auto: of logits where soft labels are wanted, so that there are teachers, and no `latents` are
    given."""
    order: Literal["joint", "sequential"] = "joint"
    """All images of a class at once, or one after the other."""
    batch_classes: int = 64
    """Classes sampled together; a group is written as soon as it is finished."""
    batch_images: int | Literal["auto"] = 256
    """Most images in one call of the denoiser; auto finds by trial how many fit into the memory."""
    memory: float | None = None
    """GiB that batch_images auto may fill; by default 80 % of what is free."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where sampling runs; of several processes on a machine each takes the GPU of its own rank."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the denoiser; guidance and scheduler stay in float32."""
    compile: bool = False
    """Compile the denoiser by torch.compile, for GPUs."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """optimal-transport guidance of the set otg"""
    diversity: DiversityConfig = field(default_factory=DiversityConfig)
    """diversity guidance of the set otg"""
    influence: InfluenceConfig = field(default_factory=InfluenceConfig)
    """influence guidance of the set otg"""
    modes: ModeConfig = field(default_factory=ModeConfig)
    """mode guidance of the set otg"""

    def __post_init__(self) -> None:
        require_kinds(self)
        require(self.starts >= 1, "starts", self.starts, "an integer >= 1")
        require(self.steps >= 1, "steps", self.steps, "an integer >= 1")
        require(self.guidance_scale >= 0, "guidance_scale", self.guidance_scale, "a number >= 0")
        require(self.batch_classes >= 1, "batch_classes", self.batch_classes, "an integer >= 1")
        size, memory = self.batch_images, self.memory
        right = size == "auto" or (isinstance(size, int) and size >= 1)
        require(right, "batch_images", size, "an integer >= 1, or auto")
        require(memory is None or memory > 0, "memory", memory, "a number of GiB > 0")
        alone = memory is None or size == "auto"
        require(alone, "memory", memory, "none beside a number of batch_images: give auto there")


@dataclass(frozen=True)
class RelabelConfig:
    """Stage 2: soft labels under replayable augmentation."""

    teachers: tuple[str, ...] = ("auto",)
    """auto (networks trained here, as many as the images per class ask for), auto:measured (as many
    as serve a short student best), names of students to train here (convnet, convnet-3, ...),
    timm:NAME (pretrained), or a checkpoint (ARCH=FILE)."""
    teacher_epochs: int | None = None
    """Epochs over the real images of a teacher trained here; by default some 800 steps, and at
    least 10 epochs."""
    label_epochs: int | None = None
    """Epochs that are labelled; a longer training goes through them again and again. By default
    every epoch has labels of its own."""
    store_labels: bool = True
    """Keep the logits of every epoch in the output; otherwise the teachers are kept in their place,
    and label while students train."""
    label_format: Literal["fp16", "topk", "q8", "q4"] = "fp16"
    """How logits are stored: 2 bytes each (fp16), the largest of each image and one value for the
    others (topk), or 1 byte (q8) or half a byte each (q4)."""
    top_k: int = 4
    """Logits kept of each image in the format topk."""
    flip: Literal["auto", "on", "off"] = "auto"
    """Horizontal flips of half of the images; auto: not of digits."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Least and largest area of random crops, as fractions of the image (from 16 pixels up)."""
    shift: float = 0.5
    """Largest shift in pixels; images under 16 pixels are shifted, rotated and zoomed, not
    cropped."""
    rotate: float = 15.0
    """Largest rotation in degrees (images under 16 pixels)."""
    zoom: float = 0.15
    """Largest change of width and height, as a fraction (images under 16 pixels)."""
    cutmix: float = 0.5
    """Probability that a batch is mixed by CutMix."""
    mixup: float = 0.0
    """Probability that a batch which CutMix left alone is mixed by Mixup."""
    mixup_alpha: float = 0.8
    """Shape a of Beta(a, a), which the weights of Mixup are drawn from."""
    patch_shuffle: int = 1
    """Patches along a side of the image that change places before the crop; 1: none (RDED: 2)."""

    def __post_init__(self) -> None:
        require_kinds(self)
        require(len(self.teachers) >= 1, "teachers", self.teachers, "at least one teacher")
        alone = "auto:measured" not in self.teachers or len(self.teachers) == 1
        require(alone, "teachers", self.teachers, "auto:measured alone")
        require(self.teachers.count("auto") <= 1, "teachers", self.teachers, "auto once")
        epochs = self.teacher_epochs
        require(epochs is None or epochs >= 1, "teacher_epochs", epochs, "an integer >= 1")
        epochs = self.label_epochs
        require(epochs is None or epochs >= 1, "label_epochs", epochs, "an integer >= 1")
        require(self.top_k >= 1, "top_k", self.top_k, "an integer >= 1")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "crop_scale", self.crop_scale, "0 < low <= high <= 1")
        for key in ("shift", "rotate", "zoom"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "a number >= 0")
        for key in ("cutmix", "mixup"):
            value = getattr(self, key)
            require(0 <= value <= 1, key, value, "a probability in [0, 1]")
        alpha, side = self.mixup_alpha, self.patch_shuffle
        require(0 < alpha <= 1, "mixup_alpha", alpha, "a number in (0, 1]")
        require(1 <= side <= 16, "patch_shuffle", side, "an integer in [1, 16]")


@dataclass(frozen=True)
class TrainConfig:
    """Stage 3: training the students that judge a set."""

    losses: tuple[Literal["ce", "ce-plain", "kl", "mse", "otm"], ...] = ("ce", "kl", "otm")
    """On hard labels ce, and ce-plain without augmentation; on soft labels kl, mse (squared error
    of the logits) and otm (that and optimal-transport logit matching)."""
    archs: tuple[str, ...] = ("convnet",)
    """Students: convnet, convnet-3, convnet-6, resnetap-10 or any timm name."""
    protocol: str | None = None
    """Named settings of stage 3 and of augmentation, under the file and the flags: edc, rded or
    igd-hard."""
    epochs: int = 300
    """Epochs of a student over the distilled set."""
    batch: int = 50
    """Images in a batch; smaller sets are one batch."""
    batch_few: int | None = None
    """Images in a batch where the data has at most 10 classes; by default as many as for others."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser of the students."""
    lr: float = 1e-3
    """Learning rate at the start of the training."""
    arch_lr: tuple[str, ...] = ()
    """Learning rates of some architectures, PATTERN=RATE, such as swin_*=1e-4."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """Learning rate: half a cosine to zero, or a fifth after 2/3 and again after 5/6 of the
    training."""
    weight_decay: float = 0.01
    """Weight decay of the optimiser, per step as a factor of the learning rate."""
    stretch: float = 1.0
    """Length of the cosine as a factor of that of the training (2 in EDC)."""
    ema: float = 0.99
    """Decay per step of the averaged weights that are tested; 0: the last weights are."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where students train and teachers are trained and label; of several processes on a machine
    each takes the GPU of its own rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the student's products in training (bf16: autocast); loss and tests are fp32."""
    tau: float = 2.0
    """Temperature of the logits in kl and in the transport term."""
    kappa_1: float = 0.025
    """Weight of the cross-entropy in mse and otm."""
    kappa_2: float = 1.0
    """Weight of the squared error of the logits in mse and otm."""
    beta_2: float = 0.08
    """Weight of the transport term in otm."""
    beta_2_share: float | None = None
    """Share of the gradient norm of the other terms, with respect to the logits, that the transport
    term is scaled to in every batch; by default its weight is fixed."""
    test_every: int | None = None
    """Epochs between two tests of a student, which its best accuracy is among; by default five
    tests in all."""
    checkpoint_every: int | None = None
    """Epochs between two checkpoints of a student, which a killed training goes on from; by default
    one a minute."""
    tensorboard: bool = False
    """Log for TensorBoard too, in logs/tensorboard."""

    def __post_init__(self) -> None:
        require_kinds(self)
        require_some(self.losses, "losses", f"some of {', '.join(LOSSES)}")
        require_some(self.archs, "archs", "at least one architecture")
        require(self.epochs >= 1, "epochs", self.epochs, "an integer >= 1")
        ok = self.protocol is None or self.protocol in PROTOCOLS
        require(ok, "protocol", self.protocol, f"one of {', '.join(PROTOCOLS)}")
        require(self.batch >= 2, "batch", self.batch, "an integer >= 2")
        for key, least in (("batch_few", 2), ("test_every", 1), ("checkpoint_every", 1)):
            value = getattr(self, key)
            require(value is None or value >= least, key, value, f"an integer >= {least}")
        require(self.lr > 0, "lr", self.lr, "a number > 0")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number >= 0")
        require(self.stretch >= 1, "stretch", self.stretch, "a number >= 1")
        require(0 <= self.ema < 1, "ema", self.ema, "a number in [0, 1)")
        require(self.tau > 0, "tau", self.tau, "a number > 0")
        weights = ("kappa_1", "kappa_2", "beta_2")
        for key in weights:
            require(getattr(self, key) >= 0, key, getattr(self, key), "a number >= 0")
        share = self.beta_2_share
        require(share is None or share > 0, "beta_2_share", share, "a number > 0")
        some = weights if share is None else weights[:2]
        used = any(getattr(self, key) > 0 for key in some)
        require(used, ", ".join(some), (0.0,) * len(some), "one of them > 0")
        used = "mse" not in self.losses or self.kappa_1 > 0 or self.kappa_2 > 0
        require(used, "kappa_1, kappa_2", (0.0, 0.0), "one of them > 0 for the loss mse")
        for entry in self.arch_lr:
            require(_is_rate(entry), "arch_lr", entry, "PATTERN=RATE with a rate > 0")

    def batch_for(self, classes: int) -> int:
        """Images in a batch for data of so many classes."""
        few = self.batch_few is not None and classes <= FEW
        return self.batch_few if few and self.batch_few else self.batch


def _is_rate(entry: str) -> bool:
    pattern, _, rate = entry.partition("=")
    try:
        return bool(pattern) and 0 < float(rate) < float("inf")
    except ValueError:
        return False


@dataclass(frozen=True)
class RunConfig:
    """Everything that one distilled set depends on."""

    data: str
    """digits, textures, an image folder (CLASS/*, or train/CLASS/* and val/ or test/), a table of
    paths and labels (.csv, .tsv, .parquet), an .npz file, or a Hugging Face data set (hf:FOLDER,
    hf:OWNER/NAME). Settings of the input follow it: photos.csv,label_column=breed or
    hf:OWNER/NAME,streaming=true."""
    ipc: int
    """Images per class in each set."""
    out: str
    """Output folder; the same command on the same folder continues."""
    seeds: int = 5
    """Students trained for each row of the table."""
    seed: int = 0
    """Seed of all else: sampling, splits of the data, teachers, augmentation."""
    resolution: int | None = None
    """Side of the images in pixels, 4 to 4096; by default that of the data."""
    skip_bad_images: bool = False
    """Leave out images that cannot be read, and list them in data.json."""
    generator: str | None = None
    """File made by `otdd fit`, or folder of a DiTPipeline, that makes the images; by default the
    one shipped for the data."""
    latents: str | None = None
    """Folder made by `otdd encode` for this data and generator, to read real latents from; by
    default they are encoded in the run."""
    preset: str | None = None
    """Named settings under the file and the flags: paper, igd, dit or mgd."""
    sets: tuple[Literal["otg", "unguided", "random", "kmeans", "kmeans-real"], ...] = SETS
    """Sets to make and compare; the first is compared with each other one."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """stage 1, the images"""
    relabel: RelabelConfig = field(default_factory=RelabelConfig)
    """stage 2, soft labels"""
    train: TrainConfig = field(default_factory=TrainConfig)
    """stage 3, students"""

    def __post_init__(self) -> None:
        require_kinds(self)
        require(bool(self.data), "data", self.data, "a data set name or a folder")
        require(bool(self.out), "out", self.out, "a folder")
        for key in ("data", "out", "generator", "latents"):
            require_path(getattr(self, key), key)
        require(self.ipc >= 1, "ipc", self.ipc, "an integer >= 1")
        require(1 <= self.seeds <= 10_000, "seeds", self.seeds, "an integer in [1, 10000]")
        require(0 <= self.seed < 2**31, "seed", self.seed, "an integer in [0, 2^31)")
        res = self.resolution
        require(res is None or 4 <= res <= 4096, "resolution", res, "an integer in [4, 4096]")
        beside = self.latents is None or self.sample.judge != "teachers"
        accepted = "auto or latents beside latents, whose images are not read"
        require(beside, "sample.judge", self.sample.judge, accepted)
        require_some(self.sets, "sets", f"some of {', '.join(SETS)}")
        ok = self.preset is None or self.preset in PRESETS
        require(ok, "preset", self.preset, f"one of {', '.join(PRESETS)}")
