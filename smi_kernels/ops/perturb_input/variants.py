"""What the gate compiles of perturbed images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from smi_kernels.aot import ARCHS, BF16, FP32, SHORT, Expects, Variant, empty, pairs, recorded, sizes
from smi_kernels.noise import families
from smi_kernels.ops.launch import Draws
from smi_kernels.ops.perturb_input.kernel import perturb_input


def variants() -> Iterator[Variant]:
    """Both kinds of counters; images whose channels begin at a counter, and others."""

    def call(family: str, dtype: torch.dtype, channels: int, size: int, antithetic: bool) -> None:
        which = Draws(first=0, count=4, seed=1, antithetic=antithetic)
        perturb_input(empty(64, channels, size, size), sigma=0.1, family=families[family], which=which, dtype=dtype)

    for family in ("gaussian", "rademacher"):
        for dtype, channels, size, both in ((BF16, 3, 32, False), (FP32, 1, 28, True)):
            name = f"{family} {SHORT[dtype]} {sizes(channels, size, size)}{pairs(both)}"
            how = partial(call, family, dtype, channels, size, both)
            yield from recorded(name, how, expects=Expects(max_registers=128), archs=ARCHS[dtype])
