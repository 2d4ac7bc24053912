"""A finished run of a folder of images whose classes have names that need care."""

import numpy as np
from distill.finished_run import finished_run
from PIL import Image

NAMES = sorted(["<script>alert(1)<", "a&b \"q\" 'r'", "$x^2$ \\$", "été chat", "漢字"])


def toy_run(root):
    """Returns the folder of the run."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for number, name in enumerate(NAMES):
            folder = root / "photos" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3)) // 2 + 25 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    finished_run(root / "run", data=str(root / "photos"), seeds=2)
    return root / "run"
