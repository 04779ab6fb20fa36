"""What the gate compiles of convolutions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from smi_kernels.aot import ARCHS, BF16, FP16, FP32, SHORT, Expects, Variant, empty, pairs, recorded, sizes
from smi_kernels.epilogues import epilogues
from smi_kernels.ops.launch import Draws
from smi_kernels.ops.perturbed_conv.kernel import Packed, perturbed_conv
from smi_kernels.ops.perturbed_conv.pack_signs import pack_signs
from smi_kernels.ops.perturbed_conv.shape import geometry


def variants() -> Iterator[Variant]:
    """Signs, and every tile with weights that are given and that are expanded from signs."""
    for both in (False, True):
        which = Draws(first=0, count=4, seed=1, antithetic=both)
        pack = partial(pack_signs, 128, 64, 9, tensor=3, which=which, device="cuda")
        yield from recorded(f"128x64x9{pairs(both)}", pack, expects=Expects(max_registers=64))

    # Image size, channels in and out, stride: one for each tile of each table, and the first layer.
    layer, narrow, deep, stem, few = (32, 64, 128, 2), (32, 64, 64, 1), (4, 512, 512, 1), (32, 3, 64, 1), (8, 64, 16, 1)
    for dtype, shapes in ((BF16, (layer, narrow, deep, stem, few)), (FP16, (layer,)), (FP32, (narrow, few))):
        for shape, signs in itertools.product(shapes, (False, True)):
            name = f"{'signs' if signs else 'dense'} {SHORT[dtype]} {sizes(*shape)}"
            # The first layer's rows of 3 channels are not aligned to anything that can be copied asynchronously.
            expects = Expects(cp_async=None if shape is stem else True, max_registers=224 if signs else 192)
            yield from recorded(name, partial(_convolve, signs, dtype, *shape), expects=expects, archs=ARCHS[dtype])


def _convolve(signs: bool, dtype: torch.dtype, size: int, channels: int, outputs: int, stride: int) -> None:
    images = empty(4 * 64, channels, size, size, dtype=dtype, channels_last=True)
    residual = empty(4 * 64, outputs, size // stride, size // stride, dtype=dtype, channels_last=True)
    weight, packed = empty(*(() if signs else (4,)), outputs, 9, channels, dtype=dtype), None
    if signs:
        packed = Packed(empty(4, outputs, 9, -(-channels // 32), dtype=torch.int32), 0.1, empty(4, outputs))
    perturbed_conv(
        images, weight, empty(4, outputs), residual, draws=4, geometry=geometry(3, stride, 1),
        epilogue=epilogues["relu"], packed=packed,
    )  # fmt: skip
