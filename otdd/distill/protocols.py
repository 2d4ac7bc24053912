"""Training protocols of the field, under the flags: `--train.protocol edc`, `rded` or `igd-hard`.

They are settings of stage 3 and of the augmentation, for a number of images per class. Marks: [PRE]
the code of that system; [INF] our inference. None claims to reproduce a paper: the networks are
ours or timm's, the schedules go by steps where those systems go by epochs, and the accuracy that is
reported is that of the last step, not of the best.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Both relabel under FKD's augmentation: crops of (.5, 1), flips, every batch mixed by CutMix [PRE].
# RDED also shuffles the patches of its own mosaics, which other sets do not have.
FKD = {"crop_scale": (0.5, 1.0), "cutmix": 1.0}

# AdamW 1e-3 but for these [PRE, RDED]; that EDC has the same is [INF].
ARCH_LR = ("mobilenetv2_*=2.5e-3", "efficientnet_b0*=2e-3", "swin*=1e-4", "vit_*=1e-4")


def edc(ipc: int) -> dict[str, Any]:
    """EDC: squared error of logits and a little cross-entropy, slow cosine, averaged weights."""
    del ipc
    return {
        "relabel": FKD,
        "train": {
            "losses": ("mse",),  # [PRE], with the next two weights
            "kappa_1": 0.025,
            "kappa_2": 1.0,
            "epochs": 300,  # [PRE], as all that follow but `arch_lr`
            "batch": 100,
            "batch_few": 50,  # EDC takes 50 and SGD 0.1 for CIFAR-100 too: give them as flags
            "optimizer": "adamw",
            "lr": 1e-3,
            "arch_lr": ARCH_LR,
            "weight_decay": 0.01,
            "schedule": "cosine",
            "stretch": 2.0,
            "ema": 0.99,
        },
    }


def rded(ipc: int) -> dict[str, Any]:
    """RDED: KL at temperature 20, slow cosine, the weights of the last step."""
    # 10, 50 and 100 at 1, 10 and 50 images per class, twice that from 100 classes on [PRE]; the
    # values in between, and that 11 to 99 classes count as many, are [INF].
    batch = 10 if ipc < 10 else 50 if ipc < 50 else 100
    return {
        "relabel": FKD,
        "train": {
            "losses": ("kl",),  # [PRE]; ours has the factor T^2, which AdamW all but cancels
            "tau": 20.0,  # [PRE], as all that follow
            "epochs": 300,
            "batch": 2 * batch,
            "batch_few": batch,
            "optimizer": "adamw",
            "lr": 1e-3,
            "arch_lr": ARCH_LR,
            "weight_decay": 0.01,
            "schedule": "cosine",
            "stretch": 2.0,
            "ema": 0.0,
        },
    }


def igd_hard(ipc: int) -> dict[str, Any]:
    """IGD on hard labels: two drops of the learning rate, every batch mixed, many epochs."""
    # Up to 200 images per class [PRE]; more are [INF].
    epochs = 3000 if ipc == 1 else 2000 if ipc <= 10 else 1500 if ipc <= 50 else 1000
    return {
        "relabel": {"cutmix": 1.0},  # [PRE]; the crops are the defaults here, [INF]
        "train": {
            "losses": ("ce",),  # [PRE], as all that follow
            "epochs": epochs,
            "batch": 64,
            "optimizer": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.01,
            "schedule": "steps",
            "ema": 0.0,
        },
    }


PROTOCOLS: dict[str, Callable[[int], dict[str, Any]]] = {
    "edc": edc,
    "rded": rded,
    "igd-hard": igd_hard,
}
