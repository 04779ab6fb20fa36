"""The exercises of `05_measure_stability`: the usual mistakes are named."""

import math

import pytest

from smi.tutorial.exercises.measure_stability import check_1, check_2


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda weight, sigma_w, draw: weight + sigma_w * draw, "unit is 5/2"),
        (lambda weight, sigma_w, draw: weight + sigma_w * weight.norm() * draw, "unit is 5/2"),
        (lambda weight, sigma_w, draw: weight + sigma_w * weight.std() * draw, "unit is 5/2"),
        (lambda weight, sigma_w, draw: weight * (1 + sigma_w * draw), "unit is 5/2"),
        (lambda weight, sigma_w, draw: weight + 2.5 * sigma_w * draw, "relative"),
        (lambda weight, sigma_w, draw: weight + sigma_w, "unit is 5/2"),
    ],
)
def test_disturb(attempt, says, rejects):
    rejects(check_1, attempt, says)


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda error, wanted: math.ceil(error / wanted - 1e-9), "sixteen times"),
        (lambda error, wanted: round((error / wanted) ** 2), "less than one draw"),
        (lambda error, wanted: max(1, round((error / wanted) ** 2)), "round up"),
    ],
)
def test_draws_needed(attempt, says, rejects):
    rejects(check_2, attempt, says)
