"""Checks for `notebooks/04_learn_a_prior.ipynb`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smi.tutorial.exercises.base import Case, check

ROWS = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.6, 0.8, 0.0, 0.0], [0.0, 0.0, 0.0, 6.0]])

BALL = (
    Case((ROWS[:1], 1.0), ROWS[:1] * 2 / 5, "The ball of a latent with d numbers has radius norm_ball · √d: here 2."),
    Case((ROWS[1:2], 1.0), ROWS[1:2], "A latent inside the ball stays where it is."),
    Case((ROWS, 1.5), ROWS * torch.tensor([[3 / 5], [1.0], [1 / 2]]), "Each latent has a norm of its own."),
)

LOSSES = torch.tensor([0.05, 2.0, 0.01, 0.3, 0.02, 5.0])

START = (
    Case((LOSSES, 2), torch.tensor([0, 2]), "0.05, 0.01 and 0.02 are all clear: of those, the first ones drawn."),
    Case((LOSSES, 4), torch.tensor([0, 2, 4, 3]), "After the clear ones come the others, the clearest first."),
)


def check_1(attempt: Callable[..., Any]) -> None:
    """Check ``into_ball(z, norm_ball)``."""
    check(attempt, BALL)


def check_2(attempt: Callable[..., Any]) -> None:
    """Check ``starts(losses, wanted)``."""
    check(attempt, START)
