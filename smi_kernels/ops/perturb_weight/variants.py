"""What the gate compiles of perturbed weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from smi_kernels.aot import ARCHS, BF16, FP16, FP32, SHORT, Expects, Variant, empty, pairs, recorded, sizes
from smi_kernels.noise import families
from smi_kernels.ops.launch import Draws
from smi_kernels.ops.perturb_weight.kernel import perturb_weight


def variants() -> Iterator[Variant]:
    """All structures and types; a wide layer, the head and the first layer."""

    def call(family: str, dtype: torch.dtype, shape: tuple[int, int, int], antithetic: bool) -> None:
        rows, channels, taps = shape
        columns = {"rank1": channels * taps, "flipout": channels}.get(families[family].structure)
        perturb_weight(
            empty(*shape), empty(4, rows, taps, channels, dtype=dtype), std=0.1, scale=empty(4, rows), tensor=3,
            family=families[family], which=Draws(first=0, count=4, seed=1, antithetic=antithetic),
            factors=None if columns is None else (empty(4, rows), empty(4, columns)),
        )  # fmt: skip

    layer, head, stem = (128, 64, 9), (10, 512, 1), (64, 3, 9)
    cases = [(family, BF16, layer, False) for family in ("gaussian", "rademacher", "rank1", "flipout")]
    cases += [("gaussian", FP16, layer, False), ("gaussian", FP32, layer, True), ("rademacher", FP32, layer, True)]
    cases += [("gaussian", BF16, head, False), ("rademacher", BF16, stem, False)]
    for family, dtype, shape, both in cases:
        name = f"{family} {SHORT[dtype]} {sizes(*shape)}{pairs(both)}"
        how = partial(call, family, dtype, shape, both)
        yield from recorded(name, how, expects=Expects(max_registers=128), archs=ARCHS[dtype])
