"""Checks for `notebooks/10_use_your_own_model.ipynb`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smi.tutorial.exercises.base import Case, check

IMAGES = torch.linspace(0, 1, 16).view(2, 2, 2, 2)
MEAN, STD = torch.tensor([0.5, 0.0]), torch.tensor([0.5, 0.25])


def means(images: Tensor) -> Tensor:
    """A model that answers with the mean of each channel ``[N, C]``."""
    return images.mean((2, 3))


NORMALISED = torch.stack([(means(IMAGES)[:, 0] - 0.5) / 0.5, means(IMAGES)[:, 1] / 0.25], 1)

LOGITS = (
    Case((means, IMAGES, torch.zeros(2), torch.ones(2)), means(IMAGES), "With mean 0 and deviation 1 nothing changes."),
    Case((means, IMAGES, MEAN, STD), NORMALISED, "Each channel has a mean and a deviation of its own."),
)

FLAT = torch.tensor([0.10, 0.12, 0.11, 0.09, 0.13])
PEAK = torch.tensor([0.10, 0.12, 0.95, 0.11, 0.09])

PEAKS = (
    Case((PEAK,), 2, "Class 2 is far above the others."),
    Case((FLAT,), -1, "Here the highest is as the others: none stands out."),
    Case((torch.tensor([0.9, 0.95, 0.85, 0.99]),), -1, "High rates alone say nothing: all classes are easy to reach."),
)


def check_1(attempt: Callable[..., Any]) -> None:
    """Check ``logits(model, images, mean, std)``."""
    check(attempt, LOGITS)


def check_2(attempt: Callable[..., Any]) -> None:
    """Check ``stands_out(rates)``."""
    check(attempt, PEAKS)
