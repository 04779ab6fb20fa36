"""Rank correlation with an interval that knows which measurements belong together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from smi.errors import InputError
from smi.runtime.seeding import derive

DRAWS = 2000


@dataclass(frozen=True)
class Correlation:
    """Spearman's ρ in [−1, 1], its 95 % interval ``low`` to ``high`` (NaN for a single group), and n pairs."""

    rho: float
    low: float
    high: float
    n: int


def rank_correlation(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    within: bool = False,
    seed: int = 0,
) -> Correlation:
    """Spearman's rank correlation of ``x`` and ``y`` ``[n]``, with a percentile bootstrap interval.

    Args:
        x: One value of each pair.
        y: The other.
        groups: What each pair belongs to (its victim). Whole groups are then drawn, since pairs of one victim are not
            independent. Without them pairs are drawn.
        within: Rank inside each group first and centre the ranks there, so that differences between groups do not
            count.
        seed: Of the draws.

    Raises:
        InputError: For fewer than three pairs, values that are not finite, and constant ones.
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in (x, y))
    if a.ndim != 1 or a.shape != b.shape or len(a) < 3 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError(f"x and y have shapes {a.shape} and {b.shape}. Allowed: [n], finite, n of 3 or more.")
    if groups is not None and len(groups) != len(a):
        raise InputError(f"There are {len(groups)} groups for {len(a)} pairs. Give one group a pair.")
    if within and groups is None:
        raise InputError(
            "within=True ranks inside groups, but there are none. Pass groups, such as each pair's victim."
        )
    numbers: dict[Hashable, int] = {}
    group = np.array([numbers.setdefault(name, len(numbers)) for name in (groups or range(len(a)))])
    if within:
        a, b = (_rank_within(values, group) for values in (a, b))
    rho = _rho(a, b, ranked=within)
    if np.isnan(rho):
        where = " inside every group" if within else ""
        raise InputError(f"x or y is constant{where}: there is nothing to rank. Use more, or other, measurements.")
    low, high = _interval(a, b, group, ranked=within, seed=seed)
    return Correlation(rho, low, high, len(a))


def _rank_within(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Ranks inside each group as shares of it, with mean 0 in each: a large group has no longer ranks than a small."""
    ranks = np.empty_like(values)
    for index in np.unique(group):
        members = group == index
        ranks[members] = (rankdata(values[members]) - 0.5) / members.sum() - 0.5
    return ranks


def _rho(a: np.ndarray, b: np.ndarray, *, ranked: bool) -> float:
    """Pearson's correlation of the ranks; NaN where one side is constant."""
    if not ranked:
        a, b = rankdata(a), rankdata(b)
    a, b = a - a.mean(), b - b.mean()
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 1e-9 else float("nan")


def _interval(a: np.ndarray, b: np.ndarray, group: np.ndarray, *, ranked: bool, seed: int) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 over draws of groups; draws in which one side is constant say nothing and are left."""
    members = [np.flatnonzero(group == index) for index in range(group.max() + 1)]
    if len(members) < 2:
        return float("nan"), float("nan")
    rng, found = np.random.default_rng(derive(seed, "bootstrap")), []
    for _ in range(DRAWS):
        index = np.concatenate([members[g] for g in rng.integers(len(members), size=len(members))])
        found.append(_rho(a[index], b[index], ranked=ranked))
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)
