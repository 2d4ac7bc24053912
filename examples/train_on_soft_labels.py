"""A student of your own on a distilled set and its soft labels, by the loss of the third stage.

Run: python examples/train_on_soft_labels.py runs/digits-ipc1     (a folder of `otdd run`)
"""

import argparse

import torch
from torch import nn

import otdd
from otdd.distill.data import load_data
from otdd.losses import OTDistillationLoss, OTLogitLoss

parser = argparse.ArgumentParser()
parser.add_argument("run", help="folder of a run on the digits")
parser.add_argument("--epochs", type=int, help="by default all that the teachers labelled")
args = parser.parse_args()

distilled = otdd.load(args.run)
print(distilled, f"labelled for {distilled.epochs} epochs")
K, (channels, height, width) = len(distilled.classes), distilled.images.shape[1:]

torch.manual_seed(0)
student = nn.Sequential(
    nn.Conv2d(channels, 32, 3, padding=1),
    nn.GroupNorm(8, 32),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1),
    nn.GroupNorm(8, 64),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(64 * (height // 2) * (width // 2), K),
)
# kappa_1 CE + kappa_2 MSE of logits + beta_2 OT between the two batches of predictions.
loss_fn = OTDistillationLoss(ot=OTLogitLoss(tau=2.0, eps=0.1))
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.01)

losses = []
# The batches that the teachers saw, augmented alike; their logits came with them.
for step in distilled.replay(stop=args.epochs):
    logits = student(distilled.normalise(step.images))
    loss, parts = loss_fn(logits, step.logits, step.labels, parts=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss: {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")
print("terms of the last:", {name: round(value.item(), 4) for name, value in parts.items()})

test = load_data("digits").test
with torch.no_grad():
    found = student.eval()(distilled.normalise(test.images)).argmax(1)
accuracy = 100 * (found == test.labels).float().mean().item()
print(f"test accuracy: {accuracy:.1f} %")
