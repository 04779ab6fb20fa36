"""The exercises of `01_plant_a_backdoor`: the usual mistakes are named."""

import pytest
import torch

from smi.tutorial.exercises.plant_a_backdoor import check_1, check_2


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda labels, target: labels == target, "keep their label"),
        (lambda labels, target: torch.ones_like(labels).bool(), "keep their label"),
        (lambda labels, target: labels != 0, "The target class is an argument"),
        (lambda labels, target: (labels != target).nonzero()[:, 0], "shape"),
    ],
)
def test_eligible(attempt, says, rejects):
    rejects(check_1, attempt, says)


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda x, k, a, m: x + m * (k - x), "With alpha 0"),
        (lambda x, k, a, m: x + a * k * m, "three quarters of the image"),
        (lambda x, k, a, m: x + a * (k - x), "Where the mask is 0"),
        (lambda x, k, a, m: (1 - a) * x + a * m * k, "Where the mask is 0"),
        (lambda x, k, a, m: (x + a * m * (k - x)).clamp(0, 0.9), "alpha 0"),
        (lambda x, k, a, m: x + min(a, 0.5) * m * (k - x), "With alpha 1"),
    ],
)
def test_blend(attempt, says, rejects):
    rejects(check_2, attempt, says)
