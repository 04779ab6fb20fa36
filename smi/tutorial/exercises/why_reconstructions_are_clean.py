"""Checks for `notebooks/08_why_reconstructions_are_clean.ipynb`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smi.tutorial.exercises.base import Case, check

DRAWS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])

MASS = (
    Case((DRAWS, torch.tensor([0.0, 0.0]), 1.5), 0.5, "Two of the four are within 1.5 of the origin."),
    Case((DRAWS, torch.tensor([3.0, 3.0]), 1.5), 0.25, "The ball is around `centre`, not around the origin."),
    Case((DRAWS, torch.tensor([0.0, 0.0]), 2.0), 0.75, "A draw on the edge belongs to the ball."),
)

GAP = (
    Case((0.0, 0.5, 0.1), 0.05, "With no public image near the trigger: slack times mass."),
    Case((0.04, 0.5, 0.1), 0.03, "What public images near the trigger take, the gap cannot have."),
    Case((0.2, 0.5, 0.1), 0.0, "Where the public mass alone is too much, no gap is small enough: 0."),
)


def check_1(attempt: Callable[..., Any]) -> None:
    """Check ``ball_mass(draws, centre, radius)``."""
    check(attempt, MASS)


def check_2(attempt: Callable[..., Any]) -> None:
    """Check ``largest_gap(public_mass, slack, mass)``."""
    check(attempt, GAP)
