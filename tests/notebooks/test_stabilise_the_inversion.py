"""The exercises of `06_stabilise_the_inversion`: the usual mistakes are named."""

import pytest

from smi.tutorial.exercises.stabilise_the_inversion import check_1, check_2


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda gradient, radius: radius * gradient, "norm 5"),
        (lambda gradient, radius: radius * gradient.sign(), "norm 5"),
        (lambda gradient, radius: radius * gradient / gradient.norm(), "norm of its own"),
    ],
)
def test_worst_step(attempt, says, rejects):
    rejects(check_1, attempt, says)


def pairs(step):
    return lambda weights, gradients, rho: [step(w, g, rho) for w, g in zip(weights, gradients, strict=True)]


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (pairs(lambda w, g, rho: w + rho * g), "norm of its own tensor"),
        (pairs(lambda w, g, rho: w + rho * g / g.norm()), "norm of its own tensor"),
        (pairs(lambda w, g, rho: rho * w.norm() * g / g.norm()), "norm of its own tensor"),
        (pairs(lambda w, g, rho: w - rho * w.norm() * g / g.norm()), "norm of its own tensor"),
        (pairs(lambda w, g, rho: w + max(rho, 0.1) * w.norm() * g / g.norm()), "stay as they are"),
    ],
)
def test_worst_weights(attempt, says, rejects):
    rejects(check_2, attempt, says)
