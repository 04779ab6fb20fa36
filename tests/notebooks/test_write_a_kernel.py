"""The exercises of `09_write_a_kernel`: the usual mistakes are named."""

import pytest
import torch

from smi.tutorial.exercises.write_a_kernel import check_1, check_2


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda n, block: n // block, "round up"),
        (lambda n, block: n // block + 1, "make 4"),
        (lambda n, block: max(4, -(-n // block)), "still need one"),
    ],
)
def test_tiles(attempt, says, rejects):
    rejects(check_1, attempt, says)


def pair(element, per_counter=4):
    return torch.stack([element // per_counter, element % per_counter], 1)


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda row, column, columns: pair(row + column), "begins with element 24"),
        (lambda row, column, columns: pair(row * columns + column, 8), "the second of counter 1"),
        (lambda row, column, columns: pair(row * (columns // 4) * 4 + column), "need not begin with a counter"),
    ],
)
def test_counter_of(attempt, says, rejects):
    rejects(check_2, attempt, says)
