"""Progress: one helper, so that it looks alike in a terminal, a notebook and a log, and can be switched off."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
EVERY = 60.0  # seconds between two lines of a log


def track(
    steps: Iterable[T], what: str, total: int | None = None, *, unit: str = "steps", before: int = 0
) -> Iterator[T]:
    """Iterate and show how far it is: a bar in a terminal or notebook, elsewhere at most one line a minute on stderr.

    ``SMI_PROGRESS=0`` hides it.

    Args:
        steps: What to iterate over.
        what: The name of the bar.
        total: How many steps there are in all; by default as many as ``steps`` says it has.
        unit: What a step is called, in the plural.
        before: How many of them were done earlier; the time that is left is told from the others.
    """
    total = total or length_hint(steps) or None
    if os.environ.get("SMI_PROGRESS") == "0":
        return iter(steps)
    if "ipykernel" in sys.modules or sys.stderr.isatty():
        return iter(tqdm(steps, desc=what, total=total, unit=f" {unit}", initial=before, leave=False))
    return _logged(steps, what, total, unit, before)


def _logged(steps: Iterable[T], what: str, total: int | None, unit: str, before: int) -> Iterator[T]:
    start = told = time.monotonic()
    for done, step in enumerate(steps, 1):
        yield step
        now = time.monotonic()
        if now - told >= EVERY:
            told = now
            line = f"{what}: {before + done}{f' of {total}' if total else ''} {unit}, {spoken(now - start)} so far"
            left = (total - before - done) * (now - start) / done if total else 0
            print(f"{line}, about {spoken(left)} left" if left > 0 else line, file=sys.stderr, flush=True)


def spoken(seconds: float) -> str:
    """A time as one says it: "40 s", "12 min", "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class Clock:
    """Seconds by stage; a stage entered twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what is inside the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + spent, 3)
