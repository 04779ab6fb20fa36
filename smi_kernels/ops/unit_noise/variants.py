"""What the gate compiles of unit noise."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from smi_kernels.aot import Expects, Variant, empty, pairs, recorded
from smi_kernels.noise import INPUT, families
from smi_kernels.ops.launch import Draws
from smi_kernels.ops.unit_noise.kernel import unit_noise


def variants() -> Iterator[Variant]:
    """Both kinds of counters, and pairs."""

    def call(family: str, antithetic: bool) -> None:
        index, which = empty(1000, dtype=torch.int64), Draws(first=0, count=4, seed=1, antithetic=antithetic)
        unit_noise(index, index, family=families[family], which=which, stream=INPUT)

    for family, both in (("gaussian", False), ("gaussian", True), ("rademacher", False)):
        yield from recorded(f"{family}{pairs(both)}", partial(call, family, both), expects=Expects(max_registers=64))
