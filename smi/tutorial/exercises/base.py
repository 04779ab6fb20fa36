"""Claims of a notebook, and its exercises: the reader's function is run on cases, and what is wrong is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One call of the reader's function.

    Attributes:
        arguments: What it is called with.
        expected: What it should return, a number or a tensor.
        hint: What is probably wrong where it returns something else.
    """

    arguments: tuple[Any, ...]
    expected: Any
    hint: str


def claim(text: str, holds: object) -> None:
    """Print ``text`` with a tick. Raises `AssertionError` where it does not hold: no notebook claims what is not so."""
    if not bool(holds):
        raise AssertionError(f"This does not hold here: {text}")
    print(f"✓ {text}")


def check(attempt: Callable[..., Any], cases: Sequence[Case], *, tolerance: float = 1e-4) -> None:
    """Print "not attempted yet", "passed", or what is wrong with the first case that fails."""
    print(verdict(attempt, cases, tolerance))


def verdict(attempt: Callable[..., Any], cases: Sequence[Case], tolerance: float = 1e-4) -> str:
    """What `check` prints. A function that returns None or raises `NotImplementedError` counts as not attempted."""
    for case in cases:
        try:
            got = attempt(*case.arguments)
        except NotImplementedError:
            got = None
        except Exception as error:  # the reader's code may fail in any way; the notebook goes on
            return f"Not yet: your function raised {type(error).__name__}: {error}"
        if got is None:
            return "Not attempted yet: replace the stub and run both cells again."
        problem = _difference(got, case.expected, tolerance)
        if problem:
            return f"Not yet: {problem} {case.hint}"
    return "Passed."


def _difference(got: Any, expected: Any, tolerance: float) -> str:
    """What is wrong with ``got``, in a sentence; empty where nothing is."""
    try:
        value, wanted = torch.as_tensor(got).double(), torch.as_tensor(expected).double()
    except (TypeError, ValueError, RuntimeError):
        return f"your function returned a {type(got).__name__}, which is no number and no tensor."
    if value.shape != wanted.shape:
        return f"your function returned shape {tuple(value.shape)} where {tuple(wanted.shape)} is right."
    if torch.allclose(value, wanted, rtol=tolerance, atol=tolerance):
        return ""
    if wanted.ndim == 0:
        return f"your function returned {value.item():.4g} where {wanted.item():.4g} is right."
    return "your function returned other numbers than are right."
