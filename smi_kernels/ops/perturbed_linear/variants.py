"""What the gate compiles of linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from smi_kernels.aot import ARCHS, BF16, FP16, FP32, SHORT, Expects, Variant, empty, recorded, sizes
from smi_kernels.epilogues import epilogues
from smi_kernels.ops.launch import Draws, Signs
from smi_kernels.ops.perturbed_linear.kernel import perturbed_linear


def variants() -> Iterator[Variant]:
    """Every tile with weights that are given and that are drawn, and every activation."""
    # Rows, outputs, features: one for each tile of each table. 300 features: rows that begin inside a counter.
    cases = [
        (False, BF16, 1024, 512, 512, "relu"), (False, BF16, 256, 128, 512, "silu"),
        (False, BF16, 256, 10, 512, "identity"), (False, BF16, 16, 512, 512, "gelu"),
        (False, FP16, 256, 128, 512, "relu"),
        (False, FP32, 256, 128, 512, "relu6"), (False, FP32, 16, 10, 512, "identity"),
        (True, BF16, 256, 128, 512, "relu"), (True, BF16, 256, 10, 512, "identity"),
        (True, BF16, 16, 512, 512, "relu"), (True, BF16, 256, 128, 300, "relu"), (True, FP32, 256, 10, 512, "identity"),
    ]  # fmt: skip
    for signs, dtype, rows, outputs, features, epilogue in cases:
        name = f"{'signs' if signs else 'dense'} {SHORT[dtype]} {sizes(rows, outputs, features)} {epilogue}"
        how = partial(_multiply, signs, dtype, rows, outputs, features, epilogue)
        expects = Expects(cp_async=True, max_registers=240 if signs else 168)
        yield from recorded(name, how, expects=expects, archs=ARCHS[dtype])


def _multiply(signs: bool, dtype: torch.dtype, rows: int, outputs: int, features: int, epilogue: str) -> None:
    x, drawn = empty(4 * rows, features, dtype=dtype), None
    weight, bias = empty(*(() if signs else (4,)), outputs, features, dtype=dtype), empty(4, outputs)
    if signs:
        which = Draws(first=0, count=4, seed=1, antithetic=True)
        drawn = Signs(std=0.1, tensor=3, which=which, scale=empty(4, outputs))
    logits = FP32 if epilogue == "identity" else None
    perturbed_linear(x, weight, bias, draws=4, epilogue=epilogues[epilogue], out_dtype=logits, signs=drawn)
