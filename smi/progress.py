"""Progress bars: one helper, so that they look alike in a terminal and in a notebook and can be switched off."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def track(steps: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Iterate behind a bar called ``what``; hidden by ``SMI_PROGRESS=0`` and where stderr is a file."""
    hidden = os.environ.get("SMI_PROGRESS") == "0" or ("ipykernel" not in sys.modules and not sys.stderr.isatty())
    return iter(tqdm(steps, desc=what, total=total, disable=hidden, leave=False))
