"""The exercises of `02_remove_it_with_clean_data`: the usual mistakes are named."""

import pytest

from smi.tutorial.exercises.remove_it_with_clean_data import check_1, check_2


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda delta, radius: delta, "twice too long"),
        (lambda delta, radius: delta.clamp(-radius, radius), "its direction stays"),
        (lambda delta, radius: delta * radius / delta.norm(), "it is not stretched"),
        (lambda delta, radius: delta / delta.norm(), "twice too long"),
        (lambda delta, radius: delta * radius / delta.norm() if delta.norm() > radius else 0 * delta, "stays as it is"),
    ],
)
def test_project(attempt, says, rejects):
    rejects(check_1, attempt, says)


def first(radii, reached):
    return radii[int(reached.nonzero()[0])]


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda radii, rates: first(radii, rates.amax(1) >= 0.5), "One backdoored class"),
        (lambda radii, rates: first(radii, rates.mean(1) >= 0.5), "neither the mean"),
        (lambda radii, rates: first(radii, rates.quantile(0.5, dim=1) > 0.5), "0.5 is enough"),
        (lambda radii, rates: int((rates.quantile(0.5, dim=1) >= 0.5).nonzero()[0]) + 1, "not its place"),
    ],
)
def test_natural_radius(attempt, says, rejects):
    rejects(check_2, attempt, says)
