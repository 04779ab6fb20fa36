"""The exercises of `04_learn_a_prior`: the usual mistakes are named."""

import pytest

from smi.tutorial.exercises.learn_a_prior import check_1, check_2


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda z, ball: z * (ball / z.norm(dim=1, keepdim=True)).clamp(max=1), "here 2"),
        (lambda z, ball: z * ball * 2 / z.norm(dim=1, keepdim=True), "inside the ball stays"),
        (lambda z, ball: z * (ball * 2 / z.norm()).clamp(max=1), "norm of its own"),
        (lambda z, ball: z.clamp(-2 * ball, 2 * ball), "here 2"),
    ],
)
def test_into_ball(attempt, says, rejects):
    rejects(check_1, attempt, says)


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda losses, wanted: losses.argsort()[:wanted], "the first ones drawn"),
        (lambda losses, wanted: (losses < 0.1).nonzero()[:wanted, 0], "shape"),
        (lambda losses, wanted: (losses >= 0.1).int().argsort(stable=True)[:wanted], "the clearest first"),
    ],
)
def test_starts(attempt, says, rejects):
    rejects(check_2, attempt, says)
