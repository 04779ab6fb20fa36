"""Checks for `notebooks/00_start_here.ipynb`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smi.tutorial.exercises.base import Case, check

CASES = (
    Case(
        (torch.tensor([0, 0, 1, 2]), torch.tensor([1, 2, 1, 2]), 0),
        0.5,
        "Two of these four images, none of which is of the target class, are taken for it.",
    ),
    Case(
        (torch.tensor([3, 3, 3, 1]), torch.tensor([3, 3, 0, 1]), 3),
        0.5,
        "Images of the target class itself prove nothing: leave them out of both counts.",
    ),
    Case(
        (torch.tensor([5, 1, 5, 3]), torch.tensor([5, 1, 2, 4]), 5),
        1 / 3,
        "Count only predictions of the target class, among the images of the other classes.",
    ),
)


def check_1(attempt: Callable[..., Any]) -> None:
    """Check ``attack_success_rate(predicted, labels, target)``."""
    check(attempt, CASES)
