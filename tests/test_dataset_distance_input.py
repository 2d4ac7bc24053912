"""What `DatasetDistance` refuses."""

import math

import pytest
import torch

from otdd.losses import DatasetDistance

SOME = torch.rand(4, 3), torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: DatasetDistance(eps=0), ValueError, "eps: got 0"),
        (lambda: DatasetDistance(eps=torch.tensor(1.0)), TypeError, "eps: got Tensor"),
        (lambda: DatasetDistance(eps_labels=-1), ValueError, "eps_labels: got -1"),
        (lambda: DatasetDistance(lambda_x=0), ValueError, "lambda_x: got 0"),
        (lambda: DatasetDistance(lambda_y=-1), ValueError, "lambda_y: got -1"),
        (lambda: DatasetDistance(metric="x"), ValueError, "metric: got 'x'"),
        (lambda: DatasetDistance(backend="x"), ValueError, "backend: got 'x'"),
        (lambda: DatasetDistance(max_iter=0), ValueError, "max_iter: got 0"),
        (lambda: DatasetDistance(labels="x"), ValueError, "labels: got 'x'; accepted: sinkhorn, g"),
        (
            lambda: DatasetDistance(labels="gaussian", metric="l1"),
            ValueError,
            "metric: got 'l1'; accepted: sqeuclidean with gaussian",
        ),
        (lambda: DatasetDistance(labels=torch.rand(2, 3)), ValueError, r"labels: got shape \(2, 3"),
        (
            lambda: DatasetDistance(labels=torch.tensor([[0.0, 1.0], [2.0, 0.0]])),
            ValueError,
            "labels: got costs that differ",
        ),
        (lambda: DatasetDistance(labels=torch.ones(2, 2).long()), TypeError, "labels: got dtype"),
        (
            lambda: DatasetDistance(labels=torch.eye(2), num_classes=2),
            ValueError,
            "num_classes: got 2; accepted: None",
        ),
        (lambda: DatasetDistance(num_classes=0), ValueError, "num_classes: got 0"),
        (lambda: DatasetDistance(num_classes=(2, 2, 2)), ValueError, "num_classes: got"),
        (lambda: DatasetDistance(num_classes=True), ValueError, "num_classes: got True"),
        (
            lambda: DatasetDistance(num_classes=(2, 1))(*SOME, *SOME),
            ValueError,
            "labels_y: got labels from 0 to 1; accepted: 0 to 0",
        ),
        (
            lambda: DatasetDistance(labels=torch.eye(1))(*SOME, *SOME),
            ValueError,
            "labels_x: got labels from 0 to 1",
        ),
        (
            lambda: DatasetDistance(labels=torch.eye(2).double())(*SOME, *SOME),
            TypeError,
            "labels: got dtype torch.float64; accepted: that of x",
        ),
        (
            lambda: DatasetDistance()(SOME[0], SOME[1].float(), *SOME),
            TypeError,
            "labels_x: got torch.float32; accepted: a tensor of int64",
        ),
        (
            lambda: DatasetDistance(labels=torch.zeros(0, 0)),
            ValueError,
            r"labels: got shape \(0, 0\)",
        ),
        (
            lambda: DatasetDistance(labels=torch.full((2, 2), math.nan)),
            ValueError,
            "labels: got nan",
        ),
        (lambda: DatasetDistance(lambda_y=torch.ones(2)), TypeError, "lambda_y: got Tensor"),
        (lambda: DatasetDistance(lambda_y=False), TypeError, "lambda_y: got bool"),
        (lambda: DatasetDistance()(*SOME, SOME[0], [0] * 4), TypeError, "labels_y: got list"),
        (
            lambda: DatasetDistance()(*SOME, SOME[0], SOME[1][:3]),
            ValueError,
            r"labels_y: got shape \(3,\)",
        ),
        (lambda: DatasetDistance()(*SOME, SOME[0][:, :2], SOME[1]), ValueError, "y: got D = 2"),
        (
            lambda: DatasetDistance()(SOME[0] * math.nan, SOME[1], *SOME),
            ValueError,
            "x: got nan",
        ),
        (
            lambda: DatasetDistance()(torch.rand(0, 4, 3), SOME[1], *SOME),
            ValueError,
            r"x: got shape \(0, 4, 3\)",
        ),
    ],
)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=f"^{says}"):
        make()


def test_a_table_of_labels_in_half_precision():
    W = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    x, labels = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
    loss = DatasetDistance(labels=W, eps=1.0)
    want = loss(x.half(), labels, x.half() + 1, labels)
    torch.testing.assert_close(loss.half()(x.half(), labels, x.half() + 1, labels), want)
