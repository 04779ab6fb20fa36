"""Why what a generator of public images makes carries no trigger: the theorem, a world where it bites, and its limits.

T is the set of stamped images and ``A_r = {x : dist(x, T) ≤ r}`` in L2. G is Λ-Lipschitz, and
``W₁(G#N(0, I), P_pub) ≤ η``.

1. If ``G(z*) ∈ A_r`` for some ``‖z*‖ ≤ R``, all z within s/Λ of z* land in ``A_{r+s}``: ``P_z[A_{r+s}] ≥ μ(R, s/Λ)``,
   the Gaussian mass of a ball of radius s/Λ whose centre has norm R.
2. By an optimal coupling and Markov, ``P_z[A_{r+s}] ≤ P_pub[A_{r+2s}] + η/s``.
3. Hence, if ``P_pub[A_{r+2s}] + η/s < μ(R, s/Λ)``, no latent of the ball carries the trigger, whatever guides the
   search.

In 64 dimensions μ is 10⁻⁴⁰ and no η can be measured that finely: there the theorem says nothing, and what is left on a
real prior is to measure (`range_distance`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from scipy.stats import ncx2
from torch import Tensor, nn

from smi.errors import InputError
from smi.inversion.latent import Latent
from smi.priors.base import Prior, check_prior, sample_latents
from smi.runtime.checks import check_images, check_number
from smi.runtime.compute import frozen
from smi.runtime.seeding import stream

CONFIDENCE = 4.0  # standard errors: one check in 30,000 fails by chance


def gaussian_ball_mass(centre: float, radius: float, dim: int) -> float:
    """μ: the mass under N(0, I) in ``dim`` dimensions of a ball whose centre has norm ``centre``, in [0, 1].

    ``‖Z − c‖²`` is noncentral χ² with ``dim`` degrees of freedom and noncentrality ``‖c‖²``. Falls as the centre moves
    away from the origin.
    """
    check_number("centre", centre, low=0)
    check_number("radius", radius, low=0)
    check_number("dim", dim, low=1, integer=True)
    return float(ncx2.cdf(radius**2, dim, centre**2))


@dataclass(frozen=True)
class Bound:
    """Both sides of 3: ``left = P_pub[A_{r+2s}] + η/s`` and ``right = μ(R, s/Λ)``."""

    left: float
    right: float

    @property
    def excludes(self) -> bool:
        """Whether the theorem rules the trigger out. If not, it says nothing."""
        return self.left < self.right


def bound(*, public_mass: float, eta: float, slack: float, lipschitz: float, centre: float, dim: int) -> Bound:
    """The inequality of the theorem.

    Args:
        public_mass: ``P_pub[A_{r+2s}]`` in [0, 1].
        eta: η, no less than the W₁ distance of generated and public images.
        slack: s.
        lipschitz: Λ.
        centre: R.
        dim: Of the latents.
    """
    check_number("public_mass", public_mass, low=0, high=1)
    check_number("eta", eta, low=0)
    for name, value in (("slack", slack), ("lipschitz", lipschitz)):
        check_number(name, value, low=1e-12)  # both are divided by
    return Bound(public_mass + eta / slack, gaussian_ball_mass(centre, slack / lipschitz, dim))


@dataclass(frozen=True)
class Reach:
    """How far the theorem reaches with some number of latent dimensions.

    Attributes:
        dim: That number, d.
        mass: μ for latents of the usual norm √d.
        eta: The largest η with which it could still rule anything out, were no public image near the trigger.
    """

    dim: int
    mass: float
    eta: float


def where_vacuous(dims: Iterable[int], *, slack: float = 2.0, lipschitz: float = 1.0) -> list[Reach]:
    """The `Reach` for each number of dimensions. An η that cannot be measured or reached makes the theorem vacuous."""
    made = []
    for dim in dims:
        right = bound(public_mass=0, eta=0, slack=slack, lipschitz=lipschitz, centre=math.sqrt(dim), dim=dim).right
        made.append(Reach(dim, right, slack * right))
    return made


@dataclass(frozen=True, kw_only=True)
class TwoPixels:
    """A world of images with two real-valued pixels, in which every quantity is known.

    ``G(z) = Λ z`` with z in two dimensions. Public images are ``N((−shift, 0), Λ² I)``, so that W₁ is exactly
    ``|shift|`` (a translation does it, and the means are as far apart). The trigger sets the first pixel to
    ``trigger``, so that T is a line.
    """

    lipschitz: float = 1.0
    shift: float = 0.02
    trigger: float = 4.0

    dim = 2

    def __post_init__(self) -> None:
        check_number("lipschitz", self.lipschitz, low=1e-12)
        check_number("shift", self.shift)
        check_number("trigger", self.trigger)

    @property
    def eta(self) -> float:
        """W₁ of generated and public images."""
        return abs(self.shift)

    def generate(self, z: Tensor) -> Tensor:
        """Latents ``[N, 2]`` to images ``[N, 2]``."""
        return self.lipschitz * z

    def public(self, n: int, rng: torch.Generator) -> Tensor:
        """``n`` public images ``[n, 2]``."""
        centre = torch.tensor([-self.shift, 0.0], dtype=torch.float64)
        return self.lipschitz * torch.randn(n, 2, generator=rng, dtype=torch.float64) + centre

    def distance(self, images: Tensor) -> Tensor:
        """L2 distance ``[N]`` to the nearest stamped image."""
        return (images[:, 0] - self.trigger).abs()

    def public_mass(self, reach: float) -> float:
        """``P_pub[A_reach]``, exact."""
        return _normal_mass(self.trigger + self.shift, reach, self.lipschitz)

    def prior_mass(self, reach: float) -> float:
        """``P_z[A_reach]``, exact."""
        return _normal_mass(self.trigger, reach, self.lipschitz)

    def closest(self, centre: float) -> float:
        """The least distance to T of ``G(z)`` over ``‖z‖ ≤ centre``, exact."""
        return max(0.0, abs(self.trigger) - self.lipschitz * centre)

    def bound(self, *, centre: float, reach: float, slack: float) -> Bound:
        """The theorem's inequality in this world.

        Args:
            centre: R.
            reach: r.
            slack: s.
        """
        return bound(
            public_mass=self.public_mass(reach + 2 * slack), eta=self.eta, slack=slack, lipschitz=self.lipschitz,
            centre=centre, dim=self.dim,
        )  # fmt: skip


def _normal_mass(offset: float, reach: float, deviation: float) -> float:
    """``P(|N(0, deviation²) − offset| ≤ reach)``."""
    ends = torch.tensor([reach, -reach], dtype=torch.float64) - abs(offset)  # on the side where nothing cancels
    high, low = torch.special.ndtr(ends / deviation)
    return (high - low).item()


@dataclass(frozen=True)
class Check:
    """One inequality ``left ≤ right``, with the Monte Carlo margin within which a violation may be chance."""

    name: str
    left: float
    right: float
    margin: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether it holds, within the margin."""
        return self.left <= self.right + self.margin


def check_world(
    world: TwoPixels, *, centre: float, reach: float, slack: float, n: int = 100_000, seed: int = 0
) -> list[Check]:
    """Each step of the theorem on ``n`` draws.

    Where a step's premise does not hold (no latent of the ball reaches A_r; the bound excludes nothing) its left side
    is 0, as it then claims nothing.

    Args:
        world: Where it is checked.
        centre: R.
        reach: r.
        slack: s.
        n: Latents, and public images, 100 or more.
        seed: Of the draws.
    """
    check_number("n", n, low=100, integer=True)
    check_number("reach", reach, low=0)
    sides = world.bound(centre=centre, reach=reach, slack=slack)
    rng = stream(seed, "two pixels")
    z, other = (torch.randn(n, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    steepest = ((world.generate(z) - world.generate(other)).norm(dim=1) / (z - other).norm(dim=1)).max().item()
    ball = ((z - torch.tensor([centre, 0.0])).norm(dim=1) <= slack / world.lipschitz).double().mean().item()
    prior = (world.distance(world.generate(z)) <= reach + slack).double().mean().item()
    public = (world.distance(world.public(n, rng)) <= reach + 2 * slack).double().mean().item()
    # Of the ball, uniform in angle, on its edge: a linear G comes closest to the line T there.
    found = world.distance(world.generate(centre * z / z.norm(dim=1, keepdim=True))).min().item()
    reaches = world.closest(centre) <= reach
    return [
        Check("Lipschitz: ‖G(z) − G(z')‖ / ‖z − z'‖ ≤ Λ", steepest, world.lipschitz, 1e-9 * world.lipschitz),
        Check("the mass of the ball is μ", abs(ball - sides.right), 0.0, _margin(sides.right, n)),
        Check("1: μ ≤ P_z[A_{r+s}]", sides.right if reaches else 0.0, prior, _margin(prior, n)),
        Check("2: P_z[A_{r+s}] ≤ P_pub[A_{r+2s}] + η/s", prior, public + world.eta / slack,
              _margin(prior, n) + _margin(public, n)),
        Check("3: r ≤ the distance of G(z) to T, ‖z‖ ≤ R", reach if sides.excludes else 0.0, found),
    ]  # fmt: skip


def _margin(share: float, n: int) -> float:
    """`CONFIDENCE` standard errors of a share; a share of 0 or 1 is known to about 1/n."""
    return CONFIDENCE * math.sqrt(max(share * (1 - share), 1 / n) / n)


def range_distance(
    prior: Prior, images: Tensor, *, steps: int = 200, seed: int = 0, lr: float = 0.05, starts: int = 512
) -> Tensor:
    """L2 distance ``[N]``, in [0, 1] pixels, of images ``[N, C, H, W]`` to what the prior makes of ``‖z‖ ≤ √d``.

    A projection: Adam on a latent per image from the nearest of ``starts`` random ones, the nearest point on the way
    counting. Hence an upper bound of the distance, to be compared between sets of images, not read as a fact of one.
    The ball is where `Latent` searches.
    """
    check_prior(prior)
    check_images(images)
    check_number("steps", steps, low=0, integer=True)
    check_number("starts", starts, low=1, integer=True)
    check_number("lr", lr, low=0)
    if tuple(images.shape[1:]) != tuple(prior.image_shape):
        raise InputError(
            f"Images are {tuple(images.shape[1:])}, the prior makes {tuple(prior.image_shape)}. Resize them."
        )
    if isinstance(prior, nn.Module):
        prior = cast(Prior, frozen(prior))
    project = Latent().project
    pool = sample_latents(prior, starts, stream(seed, "range"))
    project(pool)
    with torch.no_grad():
        made = torch.cat([prior.generate(part) for part in pool.split(256)])
    z = pool[torch.cdist(images.flatten(1), made.flatten(1)).argmin(1)].clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr)
    best = torch.full((len(images),), torch.inf)
    for _ in range(steps + 1):
        gap = (prior.generate(z) - images).flatten(1)
        best = torch.minimum(best, gap.detach().norm(dim=1))
        optimizer.zero_grad()
        gap.square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            project(z)
    return best
