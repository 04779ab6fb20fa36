"""From one divergence for each draw to one score for each image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def mean(draws: Tensor) -> Tensor:
    """Mean over dimension 1, summed in the order of the draws whatever the shape, so that the bits are fixed."""
    total = draws[:, 0]
    for k in range(1, draws.shape[1]):
        total = total + draws[:, k]
    return total / draws.shape[1]


def worst(draws: Tensor) -> Tensor:
    """Maximum over dimension 1."""
    return draws.amax(1)


def all_draws(draws: Tensor) -> Tensor:
    """The draws as they are, ``[N, K]``."""
    return draws


reductions: dict[str, Callable[[Tensor], Tensor]] = {"mean": mean, "max": worst, "none": all_draws}
"""Reductions by name, from ``[N, K]``."""
