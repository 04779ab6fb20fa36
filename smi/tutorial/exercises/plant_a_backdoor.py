"""Checks for `notebooks/01_plant_a_backdoor.ipynb`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smi.tutorial.exercises.base import Case, check

ELIGIBLE = (
    Case(
        (torch.tensor([0, 1, 2, 0]), 0),
        torch.tensor([False, True, True, False]),
        "Images of the target class keep their label: stamping them teaches nothing.",
    ),
    Case((torch.tensor([3, 1, 3]), 3), torch.tensor([False, True, False]), "The target class is an argument."),
)

IMAGES = torch.tensor([0.0, 0.2, 0.6, 1.0]).repeat(2).view(2, 1, 2, 2)
PICTURE = torch.tensor([1.0, 0.0, 0.5, 0.25]).view(1, 2, 2)
LEFT = torch.tensor([[1.0, 0.0], [1.0, 0.0]])


def _blended(alpha: float, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.bool(), (1 - alpha) * IMAGES + alpha * PICTURE, IMAGES)


BLEND = (
    Case((IMAGES, PICTURE, 0.0, torch.ones(2, 2)), IMAGES, "With alpha 0 nothing changes."),
    Case(
        (IMAGES, PICTURE, 0.25, torch.ones(2, 2)),
        _blended(0.25, torch.ones(2, 2)),
        "A quarter of the picture and three quarters of the image: not the picture on top of the whole image.",
    ),
    Case((IMAGES, PICTURE, 0.25, LEFT), _blended(0.25, LEFT), "Where the mask is 0 the image stays as it is."),
    Case((IMAGES, PICTURE, 1.0, LEFT), _blended(1.0, LEFT), "With alpha 1 the mask shows the picture alone."),
)


def check_1(attempt: Callable[..., Any]) -> None:
    """Check ``eligible(labels, target)``."""
    check(attempt, ELIGIBLE)


def check_2(attempt: Callable[..., Any]) -> None:
    """Check ``blend(images, picture, alpha, mask)``."""
    check(attempt, BLEND)
