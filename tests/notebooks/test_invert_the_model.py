"""The exercises of `03_invert_the_model`: the usual mistakes are named."""

import pytest

from smi.tutorial.exercises.invert_the_model import check_1, check_2


def differences(x):
    return x[:, :, 1:] - x[:, :, :-1], x[:, :, :, 1:] - x[:, :, :, :-1]


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda x: x.flatten(1).std(1), "two differ by 1"),
        (lambda x: sum(d.abs().flatten(1).sum(1) for d in differences(x)), "0 + 2/4"),
        (lambda x: sum(d.flatten(1).mean(1) for d in differences(x)), "which side is brighter"),
        (lambda x: sum(d.abs().mean() for d in differences(x)), "shape"),
        (lambda x: x.flatten(1).mean(1), "A flat image"),
    ],
)
def test_total_variation(attempt, says, rejects):
    rejects(check_1, attempt, says)


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda model, judge, labels: (judge == labels).float().mean(), "agrees on two of those three"),
        (lambda model, judge, labels: (judge == model).float().mean(), "agrees on two of those three"),
        (lambda model, judge, labels: ((judge == labels) & (model == labels)).float().mean(), "two of those three"),
        (lambda model, judge, labels: (judge == labels).float().sum() / max(3, len(labels) - 1), "leave it out"),
    ],
)
def test_transfer(attempt, says, rejects):
    rejects(check_2, attempt, says)
