"""The exercises of `08_why_reconstructions_are_clean`: the usual mistakes are named."""

import pytest

from smi.tutorial.exercises.why_reconstructions_are_clean import check_1, check_2


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda draws, centre, radius: (draws - centre).norm() <= radius, "Two of the four"),
        (lambda draws, centre, radius: (draws.norm(dim=1) <= radius).float().mean(), "around `centre`"),
        (lambda draws, centre, radius: ((draws - centre).norm(dim=1) < radius).float().mean(), "on the edge"),
        (lambda draws, centre, radius: ((draws - centre).abs().amax(1) <= radius).float().sum(), "Two of the four"),
    ],
)
def test_ball_mass(attempt, says, rejects):
    rejects(check_1, attempt, says)


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda public_mass, slack, mass: mass / slack, "slack times mass"),
        (lambda public_mass, slack, mass: slack * mass, "the gap cannot have"),
        (lambda public_mass, slack, mass: slack * (mass - public_mass), "no gap is small enough"),
    ],
)
def test_largest_gap(attempt, says, rejects):
    rejects(check_2, attempt, says)
