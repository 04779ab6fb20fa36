"""Checks for `notebooks/05_measure_stability.ipynb`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smi.tutorial.exercises.base import Case, check

WEIGHT = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
DRAW = torch.tensor([[1.0, -1.0], [2.0, 0.0]])

NOISE = (
    Case((WEIGHT, 0.0, DRAW), WEIGHT, "Without noise the weight stays as it is."),
    Case((WEIGHT, 0.2, DRAW), WEIGHT + 0.5 * DRAW, "This tensor has norm 5 and four elements: its unit is 5/2."),
    Case((WEIGHT + 7, 0.1, 0 * DRAW), WEIGHT + 7, "The noise is the draw times the unit, added to the weight."),
    Case((2 * WEIGHT, 0.2, DRAW), 2 * WEIGHT + DRAW, "Twice the weight, twice the noise: σ_w is relative."),
)

DRAWS = (
    Case((1.2, 0.3), 16, "A quarter of the error takes sixteen times the draws."),
    Case((0.5, 0.5), 1, "Where one draw is good enough, one is enough."),
    Case((0.2, 0.5), 1, "There is no scoring with less than one draw."),
    Case((1.0, 0.3), 12, "11.1 draws are needed: round up."),
)


def check_1(attempt: Callable[..., Any]) -> None:
    """Check ``disturb(weight, sigma_w, draw)``."""
    check(attempt, NOISE)


def check_2(attempt: Callable[..., Any]) -> None:
    """Check ``draws_needed(error, wanted)``."""
    check(attempt, DRAWS)
