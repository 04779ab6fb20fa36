"""Checks for `notebooks/07_remove_without_data.ipynb`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smi.tutorial.exercises.base import Case, check

RATING = (
    Case((0.98, 1.0, 0.98, 1.0), 0.5, "Where nothing changed, the rating is a half."),
    Case((0.98, 1.0, 0.96, 0.0), 0.99, "The attack is gone, for two points of accuracy: 0.99."),
    Case((0.9, 0.8, 0.95, 0.2), 0.8, "A gain in accuracy is cut off at 0: it is no merit of the removal."),
    Case((0.9, 0.8, 0.9, 0.9), 0.5, "A rise of ASR is cut off at 0, too."),
)

PROBABILITIES = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.8, 0.2], [0.45, 0.55], [0.7, 0.3], [0.3, 0.7]])

SUREST = (
    Case((PROBABILITIES, 2), torch.tensor([2, 4, 1, 5]), "Class 0: images 2 and 4; class 1: images 1 and 5."),
    Case((PROBABILITIES, 3), torch.tensor([2, 4, 0, 1, 5, 3]), "Image 0 is the third of class 0, image 3 of class 1."),
    Case(
        (torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [0.2, 0.3, 0.5]]), 1),
        torch.tensor([1, 2]),
        "An image is of the class that the model calls it: here none is of class 1.",
    ),
)


def check_1(attempt: Callable[..., Any]) -> None:
    """Check ``der(acc_before, asr_before, acc, asr)``."""
    check(attempt, RATING)


def check_2(attempt: Callable[..., Any]) -> None:
    """Check ``surest(probabilities, per_class)``."""
    check(attempt, SUREST)
