"""How far two labelled data sets are apart, whatever their labels are called.

Run: python examples/dataset_distance.py
"""

import torch
from sklearn.datasets import load_digits

from otdd.losses import DatasetDistance

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16  # (1797, 64) in [0, 1]
labels = torch.tensor(digits.target)
one, two = torch.arange(0, 300), torch.arange(300, 600)

# The cost between points is their distance and that of their classes, which is transport too.
distance = DatasetDistance(eps=0.5, max_iter=100)


def upside_down(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 8, 8).flip(1).flatten(1)


x, labels_x = images[one], labels[one]
y, labels_y = images[two], labels[two]
distances = {
    "itself": distance(x, labels_x, x, labels_x),
    "other images of the same digits": distance(x, labels_x, y, labels_y),
    "those with labels renamed": distance(x, labels_x, y, 9 - labels_y),
    "those upside down": distance(x, labels_x, upside_down(y), labels_y),
    "those with labels shuffled": distance(x, labels_x, y, labels_y[torch.randperm(len(y))]),
}
for name, value in distances.items():
    print(f"{value.item():8.3f}  {name}")

# It has gradients in the points: here one step that brings the flipped images nearer.
z = upside_down(y).requires_grad_()
before = distance(x, labels_x, z, labels_y)
before.backward()
after = distance(x, labels_x, z.detach() - 0.1 * len(z) * z.grad, labels_y)
print(f"{after.item():8.3f}  after one step along the gradient, from {before.item():.3f}")
