"""Checks for `notebooks/06_stabilise_the_inversion.ipynb`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from smi.tutorial.exercises.base import Case, check

GRADIENT = torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]], [[[0.0, -0.1], [0.0, 0.0]]]])
UNIT = torch.tensor([[[[0.6, 0.0], [0.0, 0.8]]], [[[0.0, -1.0], [0.0, 0.0]]]])

STEP = (
    Case((GRADIENT[:1], 1.0), UNIT[:1], "This gradient has norm 5: the step is the gradient over 5."),
    Case((GRADIENT, 2.0), 2 * UNIT, "Each image has a norm of its own, however small its gradient."),
)

WEIGHTS = [torch.tensor([3.0, 4.0]), torch.tensor([[0.0, 0.5]])]
GRADIENTS = [torch.tensor([0.0, 100.0]), torch.tensor([[-0.3, 0.4]])]
MOVED = torch.tensor([3.0, 4.5, -0.03, 0.54])

SHARP = (
    Case((WEIGHTS, GRADIENTS, 0.1), MOVED, "Each v has norm ρ times the norm of its own tensor: here 0.5 and 0.05."),
    Case((WEIGHTS, GRADIENTS, 0.0), torch.tensor([3.0, 4.0, 0.0, 0.5]), "With ρ = 0 the weights stay as they are."),
)


def check_1(attempt: Callable[..., Any]) -> None:
    """Check ``worst_step(gradient, radius)``."""
    check(attempt, STEP)


def check_2(attempt: Callable[..., Any]) -> None:
    """Check ``worst_weights(weights, gradients, rho)``."""

    def flat(weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float) -> Tensor | None:
        found = attempt(weights, gradients, rho)
        return None if found is None else torch.cat([tensor.flatten() for tensor in found])

    check(flat, SHARP)
