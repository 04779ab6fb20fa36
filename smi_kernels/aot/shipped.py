"""What is shipped: every Triton kernel as its launchers launch it, with what it may cost.

`python -m smi_kernels.aot` compiles all of it without a GPU. Each operator lists its own, in ``variants.py``.

Shapes stand for all that reach the same code: those of the layers of a ResNet on 32×32 images, and odd ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from smi_kernels.aot.variant import Variant
from smi_kernels.ops import OPERATORS


def variants() -> Iterator[Variant]:
    """Everything that is shipped. Each value of each choice is there once or more, not each combination."""
    for name in OPERATORS:
        yield from import_module(f"smi_kernels.ops.{name}.variants").variants()
