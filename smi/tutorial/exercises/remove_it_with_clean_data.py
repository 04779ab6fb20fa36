"""Checks for `notebooks/02_remove_it_with_clean_data.ipynb`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smi.tutorial.exercises.base import Case, check

LONG = torch.tensor([3.0, 0.0, -4.0, 0.0]).view(1, 2, 2)
SHORT = torch.tensor([0.3, 0.0, -0.4, 0.0]).view(1, 2, 2)

PROJECT = (
    Case((LONG, 2.5), LONG / 2, "This δ is twice too long: its direction stays, its norm becomes the radius."),
    Case((SHORT, 2.5), SHORT, "A δ that is short enough stays as it is: it is not stretched."),
    Case((LONG, 5.0), LONG, "A δ of exactly the radius stays as it is."),
)

RATES = torch.tensor([[0.9, 0.1, 0.0], [1.0, 0.4, 0.2], [1.0, 0.6, 0.3], [1.0, 0.9, 0.8]])

RADIUS = (
    Case(
        ([1.0, 2.0, 3.0, 4.0], RATES),
        3.0,
        "One backdoored class is reached at once: neither the mean nor the largest rate is the median.",
    ),
    Case(([1.0, 2.0], torch.tensor([[0.0, 0.5, 0.9], [0.6, 0.7, 0.9]])), 1.0, "At least half: 0.5 is enough."),
    Case(([2.0, 5.0], torch.tensor([[0.2, 0.4, 0.1], [0.7, 0.6, 0.9]])), 5.0, "Return the radius, not its place."),
)


def check_1(attempt: Callable[..., Any]) -> None:
    """Check ``project(delta, radius)``."""
    check(attempt, PROJECT)


def check_2(attempt: Callable[..., Any]) -> None:
    """Check ``natural_radius(radii, rates)``."""
    check(attempt, RADIUS)
