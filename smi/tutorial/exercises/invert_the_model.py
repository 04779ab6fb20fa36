"""Checks for `notebooks/03_invert_the_model.ipynb`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smi.tutorial.exercises.base import Case, check

FLAT = torch.full((1, 1, 3, 3), 0.4)
EDGE = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]).view(1, 1, 2, 3)
TWO = torch.cat([EDGE, EDGE.flip(3) * 0.5])

VARIATION = (
    Case((FLAT,), torch.zeros(1), "A flat image has no variation."),
    Case(
        (EDGE,),
        torch.tensor([0.5]),
        "No row differs from the next, and of the four pairs of neighbours in a row two differ by 1: 0 + 2/4.",
    ),
    Case((TWO,), torch.tensor([0.5, 0.25]), "One number an image, and it does not matter which side is brighter."),
)

TRANSFER = (
    Case(
        (torch.tensor([1, 2, 3, 3]), torch.tensor([1, 0, 3, 0]), torch.tensor([1, 2, 3, 4])),
        2 / 3,
        "The model takes three of these for their class; the judge agrees on two of those three.",
    ),
    Case(
        (torch.tensor([5, 6]), torch.tensor([5, 7]), torch.tensor([5, 7])),
        1.0,
        "An image that the model itself does not take for its class proves nothing: leave it out.",
    ),
)


def check_1(attempt: Callable[..., Any]) -> None:
    """Check ``total_variation(images)``."""
    check(attempt, VARIATION)


def check_2(attempt: Callable[..., Any]) -> None:
    """Check ``transfer(model, judge, labels)``."""
    check(attempt, TRANSFER)
