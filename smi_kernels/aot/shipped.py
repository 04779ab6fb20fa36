"""What is shipped: every Triton kernel as its launchers launch it, with what it may cost.

`python -m smi_kernels.aot` compiles all of it without a GPU.

Shapes stand for all that reach the same code: those of the layers of a ResNet on 32×32 images, and odd ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from smi_kernels.aot.record import empty, recorded
from smi_kernels.aot.variant import Expects, Variant
from smi_kernels.registry import load_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_HALF = (80, 86, 89, 90)  # from sm_80 on, see `backends.triton.supports`: below, Triton's products in 16 bits spill
_ARCHS = {BF16: _HALF, FP16: _HALF, FP32: None}


def variants() -> Iterator[Variant]:
    """Everything that is shipped. Each value of each choice is there once or more, not each combination."""
    yield from _unit_noise()
    yield from _perturb_weight()
    yield from _perturb_input()
    yield from _score_logits()
    yield from _pack_signs()
    yield from _perturbed_conv()
    yield from _perturbed_linear()


_DRAWS: dict[str, Any] = {"first": 0, "draws": 4, "seed": 1}


def _unit_noise() -> Iterator[Variant]:
    from smi_kernels.noise import INPUT, families
    from smi_kernels.ops.unit_noise.kernel import unit_noise

    def call(family: str, antithetic: bool) -> None:
        index = empty(1000, dtype=torch.int64)
        unit_noise(index, index, family=families[family], stream=INPUT, antithetic=antithetic, **_DRAWS)

    for family, pairs in (("gaussian", False), ("gaussian", True), ("rademacher", False)):
        yield from recorded(f"{family}{_pairs(pairs)}", partial(call, family, pairs), expects=Expects(max_registers=64))


def _perturb_weight() -> Iterator[Variant]:
    from smi_kernels.noise import families
    from smi_kernels.ops.perturb_weight.kernel import perturb_weight

    def call(family: str, dtype: torch.dtype, shape: tuple[int, int, int], antithetic: bool) -> None:
        rows, channels, taps = shape
        structure = families[family].structure
        columns = {"rank1": channels * taps, "flipout": channels}.get(structure)
        perturb_weight(
            empty(*shape), empty(4, rows, taps, channels, dtype=dtype), std=0.1, scale=empty(4, rows), tensor=3,
            family=families[family], structure=structure, antithetic=antithetic,
            factors=None if columns is None else (empty(4, rows), empty(4, columns)), **_DRAWS,
        )  # fmt: skip

    layer, head, stem = (128, 64, 9), (10, 512, 1), (64, 3, 9)
    cases = [(family, BF16, layer, False) for family in ("gaussian", "rademacher", "rank1", "flipout")]
    cases += [("gaussian", FP16, layer, False), ("gaussian", FP32, layer, True), ("rademacher", FP32, layer, True)]
    cases += [("gaussian", BF16, head, False), ("rademacher", BF16, stem, False)]
    for family, dtype, shape, pairs in cases:
        name = f"{family} {_NAMES[dtype]} {_sizes(*shape)}{_pairs(pairs)}"
        how = partial(call, family, dtype, shape, pairs)
        yield from recorded(name, how, expects=Expects(max_registers=128), archs=_ARCHS[dtype])


def _perturb_input() -> Iterator[Variant]:
    from smi_kernels.noise import families
    from smi_kernels.ops.perturb_input.kernel import perturb_input

    def call(family: str, dtype: torch.dtype, channels: int, size: int, antithetic: bool) -> None:
        images = empty(64, channels, size, size)
        perturb_input(images, sigma=0.1, family=families[family], antithetic=antithetic, dtype=dtype, **_DRAWS)

    for family in ("gaussian", "rademacher"):
        for dtype, channels, size, pairs in ((BF16, 3, 32, False), (FP32, 1, 28, True)):
            name = f"{family} {_NAMES[dtype]} {_sizes(channels, size, size)}{_pairs(pairs)}"
            how = partial(call, family, dtype, channels, size, pairs)
            yield from recorded(name, how, expects=Expects(max_registers=128), archs=_ARCHS[dtype])


def _score_logits() -> Iterator[Variant]:
    from smi_kernels.divergences import divergences
    from smi_kernels.ops.score_logits.kernel import score_logits

    def call(divergence: str, reduce: str, classes: int) -> None:
        labels = empty(256, dtype=torch.int64) if divergences[divergence].needs_labels else None
        clean, perturbed = empty(256, classes), empty(16, 256, classes)
        score_logits(clean, perturbed, labels, divergence=divergences[divergence], reduce=reduce)

    cases = [("kl", "mean", 1000), ("cross_entropy", "none", 10), ("total_variation", "max", 10)]
    cases += [("margin", "mean", 10), ("flip", "mean", 10)]
    for divergence, reduce, classes in cases:
        name = f"{divergence} {reduce} {classes} classes"
        yield from recorded(name, partial(call, divergence, reduce, classes), expects=Expects(max_registers=128))


def _pack_signs() -> Iterator[Variant]:
    from smi_kernels.ops.perturbed_conv.pack_signs import pack_signs

    for pairs in (False, True):
        call = partial(pack_signs, 128, 64, 9, tensor=3, antithetic=pairs, device="cuda", **_DRAWS)
        yield from recorded(f"128x64x9{_pairs(pairs)}", call, expects=Expects(max_registers=64))


def _perturbed_conv() -> Iterator[Variant]:
    from smi_kernels.epilogues.triton import relu
    from smi_kernels.ops.perturbed_conv.kernel import perturbed_conv, perturbed_conv_signs

    def call(signs: bool, dtype: torch.dtype, size: int, channels: int, outputs: int, stride: int) -> None:
        images = empty(4 * 64, channels, size, size, dtype=dtype, channels_last=True)
        residual = empty(4 * 64, outputs, size // stride, size // stride, dtype=dtype, channels_last=True)
        scale, bias = empty(4, outputs), empty(4, outputs)
        how: dict[str, Any] = {"draws": 4, "kernel_size": 3, "stride": stride, "padding": 1, "epilogue": relu}
        if signs:
            theta = empty(outputs, 9, channels, dtype=dtype)
            packed = empty(4, outputs, 9, -(-channels // 32), dtype=torch.int32)
            perturbed_conv_signs(images, theta, packed, scale, bias, residual, std=0.1, **how)
        else:
            perturbed_conv(images, empty(4, outputs, 9, channels, dtype=dtype), bias, residual, **how)

    # Image size, channels in and out, stride: one for each tile of each table, and the first layer.
    layer, narrow, deep, stem, few = (32, 64, 128, 2), (32, 64, 64, 1), (4, 512, 512, 1), (32, 3, 64, 1), (8, 64, 16, 1)
    for dtype, shapes in ((BF16, (layer, narrow, deep, stem, few)), (FP16, (layer,)), (FP32, (narrow, few))):
        for shape, signs in itertools.product(shapes, (False, True)):
            name = f"{'signs' if signs else 'dense'} {_NAMES[dtype]} {_sizes(*shape)}"
            # The first layer's rows of 3 channels are not aligned to anything that can be copied asynchronously.
            expects = Expects(cp_async=None if shape is stem else True, max_registers=224 if signs else 192)
            yield from recorded(name, partial(call, signs, dtype, *shape), expects=expects, archs=_ARCHS[dtype])


def _perturbed_linear() -> Iterator[Variant]:
    from smi_kernels.epilogues import epilogues
    from smi_kernels.ops.perturbed_linear.kernel import perturbed_linear, perturbed_linear_signs

    def call(signs: bool, dtype: torch.dtype, rows: int, outputs: int, features: int, epilogue: str) -> None:
        x = empty(4 * rows, features, dtype=dtype)
        how: dict[str, Any] = {"epilogue": load_kernel(epilogues[epilogue].kernel)}
        if epilogue == "identity":
            how["out_dtype"] = FP32  # logits
        if signs:
            where = {"std": 0.1, "tensor": 3, "antithetic": True, **_DRAWS}
            theta = empty(outputs, features, dtype=dtype)
            perturbed_linear_signs(x, theta, empty(4, outputs), empty(4, outputs), **where, **how)
        else:
            perturbed_linear(x, empty(4, outputs, features, dtype=dtype), empty(4, outputs), draws=4, **how)

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
        name = f"{'signs' if signs else 'dense'} {_NAMES[dtype]} {_sizes(rows, outputs, features)} {epilogue}"
        yield from recorded(
            name,
            partial(call, signs, dtype, rows, outputs, features, epilogue),
            expects=Expects(cp_async=True, max_registers=240 if signs else 168),
            archs=_ARCHS[dtype],
        )


_NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}


def _sizes(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def _pairs(antithetic: bool) -> str:
    return " antithetic" if antithetic else ""
