"""Checks for `notebooks/09_write_a_kernel.ipynb`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from smi.tutorial.exercises.base import Case, check

TILES = (
    Case((64, 16), 4, "64 elements in tiles of 16 make 4."),
    Case((65, 16), 5, "One element more needs a tile more: round up."),
    Case((3, 16), 1, "Fewer elements than a tile still need one."),
)

PLACES = (
    Case((torch.tensor([0]), torch.tensor([5]), 8), torch.tensor([[1, 1]]), "Element 5: the second of counter 1."),
    Case(
        (torch.tensor([3, 3]), torch.tensor([0, 7]), 8), torch.tensor([[6, 0], [7, 3]]),
        "Row 3 of 8 columns begins with element 24.",
    ),
    Case((torch.tensor([1]), torch.tensor([0]), 6), torch.tensor([[1, 2]]), "A row need not begin with a counter."),
)  # fmt: skip


def check_1(attempt: Callable[..., Any]) -> None:
    """Check ``tiles(n, block)``."""
    check(attempt, TILES)


def check_2(attempt: Callable[..., Any]) -> None:
    """Check ``counter_of(row, column, columns)``."""
    check(attempt, PLACES)
