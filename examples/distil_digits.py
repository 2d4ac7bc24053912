"""The whole pipeline from Python: images, soft labels, students, table, and the set read back.

Run: python examples/distil_digits.py --out runs/digits-example     (minutes on a CPU)
     python examples/distil_digits.py --out runs/quick --quick      (seconds; figures mean nothing)
"""

import argparse

import otdd
from otdd.distill import resolve, run

parser = argparse.ArgumentParser()
parser.add_argument("--out", required=True, help="the folder of the run; the same one goes on")
parser.add_argument("--quick", action="store_true", help="settings too small for real figures")
args = parser.parse_args()

settings = {"data": "digits", "ipc": 1, "out": args.out, "sets": ["otg", "random"]}
if args.quick:
    settings |= {
        "seeds": 1,
        "sample": {"steps": 4, "starts": 1},
        "relabel": {"teacher_epochs": 1},
        "train": {"epochs": 4, "losses": ["ce", "otm"]},
    }

# The same names as the flags of `otdd run`; a wrong one is refused with what is accepted.
metrics = run(resolve(settings))
for row in metrics["accuracy"]:
    print(f"{row['set']:8} {row['loss']:4} {row['mean']:5.1f} +- {row['std']:.1f}")
print("transport cost to the real images:", metrics["ot_cost"])

distilled = otdd.load(args.out)  # the set otg
print(distilled)
image, label = distilled[0]
print(f"the first is of class {distilled.classes[label]!r}, {tuple(image.shape)}")
