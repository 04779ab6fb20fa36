"""The number format that models run in: weights, logits and losses are float32 whatever it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

from smi.errors import unknown_name
from smi_kernels.precision import has_bfloat16

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
_asked: ContextVar[str] = ContextVar("precision", default="auto")


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Inside the block models run in this number format.

    Weights, logits and losses are float32 whatever it is.

    Args:
        name: "auto" (bfloat16 where that is quick), "float32", "bfloat16" or "float16" (without loss scaling: small
            gradients vanish).

    Raises:
        InputError: For another name.

    >>> with precision("float32"):
    ...     asked_precision()
    'float32'
    """
    if name not in PRECISIONS:
        raise unknown_name("precision", name, PRECISIONS)
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def asked_precision() -> str:
    """What the innermost `precision` asked for."""
    return _asked.get()


def mixed(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to what `precision` asks for on ``device``; nothing where torch has no autocast for it."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    name = asked_precision()
    if name == "auto":
        return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device), cache_enabled=False)
    kind = torch.float16 if name == "float16" else torch.bfloat16
    return torch.autocast(device.type, kind, enabled=name != "float32", cache_enabled=False)
