"""Ctrl-C and SIGTERM: raised as exceptions, and held back where work must not be cut in the middle of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal that ends the work.

    Attributes:
        signal: Its number; a shell expects 128 more as exit code.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise `Stopped` in the block; while that cleans up, a second one ends the process at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOPS:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    with _handled(stop):
        yield


@contextmanager
def delayed_signals() -> Iterator[Callable[[], int | None]]:
    """Ctrl-C and SIGTERM wait in the block. Yields a function that says which has come; it is raised at the end.

    A second one is not held back. Outside the main thread, where Python handles no signals, nothing is held.
    """
    came: list[int] = []
    before: dict[int, Any] = {number: signal.getsignal(number) for number in STOPS}

    def remember(number: int, frame: FrameType | None) -> None:
        if came and callable(before[number]):
            before[number](number, frame)
        came.append(number)

    with _handled(remember):
        yield lambda: came[0] if came else None
    if came:
        signal.raise_signal(came[0])


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """``handler`` for both signals in the block, where this thread may set one; an ignored signal stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
