"""The theorem: μ against closed forms, every inequality in a world where all is known, distance to a prior's range."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import chi2, poisson
from tiny import TinyPrior, noise
from torch import nn

from smi.analysis import (
    TwoPixels,
    bound,
    check_world,
    gaussian_ball_mass,
    range_distance,
    where_vacuous,
)
from smi.attacks import BadNets
from smi.errors import InputError


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("centre", "radius", "dim"), [(1.0, 1.0, 2), (3.0, 2.0, 9), (8.0, 2.0, 64), (0.0, 1.5, 3)])
def test_the_mass_of_a_ball_is_a_poisson_mixture_of_chi_squares(centre, radius, dim):
    k = np.arange(400)
    expected = (poisson.pmf(k, centre**2 / 2) * chi2.cdf(radius**2, dim + 2 * k)).sum()
    assert gaussian_ball_mass(centre, radius, dim) == pytest.approx(expected, rel=1e-9)


def test_the_mass_of_a_ball_in_one_dimension_and_far_out():
    interval = torch.special.ndtr(torch.tensor([2.5, -0.5], dtype=torch.float64))
    assert gaussian_ball_mass(1.0, 1.5, 1) == pytest.approx((interval[0] - interval[1]).item(), rel=1e-12)
    masses = [gaussian_ball_mass(r, 1.0, 4) for r in (0, 0.5, 1, 2, 4)]
    assert masses == sorted(masses, reverse=True)


def test_where_the_theorem_is_vacuous():
    reach = where_vacuous([8, 16, 64])
    assert [r.dim for r in reach] == [8, 16, 64]
    assert [r.mass for r in reach] == pytest.approx([1.00e-2, 1.84e-6, 1.96e-40], rel=0.01)
    for r in reach:
        edge = {"public_mass": 0, "slack": 2.0, "lipschitz": 1.0, "centre": math.sqrt(r.dim), "dim": r.dim}
        assert bound(eta=0.999 * r.eta, **edge).excludes
        assert not bound(eta=1.001 * r.eta, **edge).excludes


def test_the_bound_has_both_terms():
    found = bound(public_mass=0.1, eta=0.06, slack=0.5, lipschitz=2.0, centre=1.0, dim=2)
    assert found.left == pytest.approx(0.22)
    assert found.right == gaussian_ball_mass(1.0, 0.25, 2)
    for name in ("slack", "lipschitz"):
        with pytest.raises(InputError, match=f"{name} is 0"):
            bound(**{"public_mass": 0, "eta": 0, "slack": 1, "lipschitz": 1, "centre": 1, "dim": 2, name: 0})


@pytest.mark.parametrize("shift", [0.02, -0.3])
@pytest.mark.parametrize(
    ("trigger", "reach", "slack", "lipschitz", "premise", "excluded"),
    [
        (4.0, 0.1, 1.0, 1.0, False, True),  # the theorem speaks
        (0.9, 0.1, 1.0, 1.0, True, False),  # a latent carries the trigger, and step 1 must hold
        (2.2, 0.3, 0.7, 2.0, True, False),
        (2.5, 0.1, 1.0, 1.0, False, False),  # no latent does, but the theorem cannot tell
    ],
)
def test_every_inequality_holds_in_the_two_pixel_world(trigger, reach, slack, lipschitz, premise, excluded, shift):
    world = TwoPixels(lipschitz=lipschitz, shift=shift, trigger=trigger)
    sides = world.bound(centre=1.0, reach=reach, slack=slack)
    assert sides.excludes == (excluded and abs(shift) < 0.1)
    checks = check_world(world, centre=1.0, reach=reach, slack=slack, n=20_000)
    assert [check.name for check in checks if not check.holds] == []
    assert (checks[2].left > 0) == premise
    assert checks[2].right == pytest.approx(world.prior_mass(reach + slack), abs=0.02)
    assert checks[3].right == pytest.approx(world.public_mass(reach + 2 * slack) + abs(shift) / slack, abs=0.02)
    assert (checks[4].left > 0) == sides.excludes


def test_a_world_that_lies_about_itself_is_caught():
    class Steep(TwoPixels):
        def generate(self, z):
            return 3 * super().generate(z)

    class Elsewhere(TwoPixels):
        def public(self, n, rng):
            return super().public(n, rng) - 5

    steep = check_world(Steep(), centre=1.0, reach=0.1, slack=1.0, n=20_000)
    assert not steep[0].holds  # and a latent of the ball comes as near as 1 to a trigger that 3 leaves out
    away = check_world(Elsewhere(trigger=1.0), centre=1.0, reach=0.1, slack=1.0, n=20_000)
    assert [check.holds for check in away] == [True, True, True, False, True]


def test_masses_of_a_strip_are_exact_in_the_tail():
    assert TwoPixels(trigger=0.0).prior_mass(1.0) == pytest.approx(math.erf(1 / math.sqrt(2)), rel=1e-12)
    far = TwoPixels(trigger=-12.0, shift=0.0)
    assert far.prior_mass(1.0) == pytest.approx(math.erfc(11 / math.sqrt(2)) / 2, rel=1e-9)
    assert far.public_mass(1.0) == far.prior_mass(1.0)


class Line(nn.Module):
    """Images ``0.5 + z · u / 8`` for a unit vector u: the distance to its range is known."""

    latent_dim, image_shape = 4, (1, 8, 8)

    def __init__(self):
        super().__init__()
        self.basis = nn.Parameter(torch.linalg.qr(torch.randn(64, 4, generator=rng(2))).Q.T)

    def generate(self, z):
        return (0.5 + (z @ self.basis) / 8).view(-1, 1, 8, 8)

    def criticise(self, images):
        return None


def test_range_distance_is_the_distance_to_a_linear_range_within_the_ball():
    prior = Line()
    inside = prior.generate(torch.tensor([[1.0, 0, 0, 0], [0, -1, 1, 0]])).detach()
    away = torch.linalg.qr(torch.cat([prior.basis.detach().T, torch.ones(64, 1)], 1)).Q[:, 4].view(1, 1, 8, 8)
    beyond = prior.generate(torch.tensor([[5.0, 0, 0, 0]])).detach()  # the ball ends at √4
    images = torch.cat([inside, inside + 0.4 * away, beyond])
    found = range_distance(prior, images, steps=400, lr=0.02)
    assert found.tolist() == pytest.approx([0, 0, 0.4, 0.4, 3 / 8], abs=5e-3)
    assert torch.equal(found, range_distance(prior, images, steps=400, lr=0.02))
    assert (range_distance(prior, images, steps=3) >= found - 1e-3).all()
    with pytest.raises(InputError, match="Resize"):
        range_distance(prior, noise(2, 1, 16, 16))


def test_stamped_images_are_further_from_a_priors_range():
    prior = TinyPrior()
    with torch.no_grad():
        own = prior.generate(torch.randn(12, 6, generator=rng()) * 0.7)
    near, far = (range_distance(prior, x, steps=80) for x in (own, BadNets(size=3).stamp(own)))
    assert (near < far).all()
