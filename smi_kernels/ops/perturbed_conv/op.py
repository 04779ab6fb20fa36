"""``torch.ops.smi_kernels.perturbed_conv`` and ``perturbed_conv_signs``."""

# No "from __future__ import annotations": torch reads the operators' schemas from the annotations.

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from smi_kernels.epilogues import epilogues
from smi_kernels.ops.launch import Draws, Signs, launched
from smi_kernels.ops.perturbed_conv import reference
from smi_kernels.ops.perturbed_conv.shape import Geometry, geometry


@custom_op("smi_kernels::perturbed_conv", mutates_args=())
def perturbed_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, draws: int, kernel: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int, epilogue: str, shared: bool,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `smi_kernels.ops.perturbed_conv.kernel`."""
    return launched(reference.perturbed_conv, x)(
        x, weight, bias, residual, draws=draws, geometry=geometry(kernel, stride, padding, dilation, groups),
        epilogue=epilogues[epilogue], shared=shared, out_dtype=out_dtype,
    )  # fmt: skip


@custom_op("smi_kernels::perturbed_conv_signs", mutates_args=())
def perturbed_conv_signs(
    x: Tensor, theta: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, std: float,
    tensor: int, first: int, draws: int, seed_low: int, seed_high: int, antithetic: bool, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, epilogue: str, shared: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `smi_kernels.ops.perturbed_conv.kernel`: one bit a weight, expanded inside the product; float32 theta."""
    which = Draws.of(first, draws, seed_low, seed_high, antithetic)
    return launched(reference.perturbed_conv_signs, x)(
        x, theta.to(x.dtype), bias, residual,
        geometry=geometry(theta.shape[2:], stride, padding, dilation, groups),
        signs=Signs(std=std, tensor=tensor, which=which, scale=scale),
        epilogue=epilogues[epilogue], shared=shared, out_dtype=out_dtype,
    )  # fmt: skip


@perturbed_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: object, residual: object, draws: int, *rest: Any) -> Tensor:
    *numbers, _, shared, out_dtype = rest
    return _result(x, weight.shape[1], draws, geometry(*numbers), shared, out_dtype)


@perturbed_conv_signs.register_fake
def _(x: Tensor, theta: Tensor, *rest: Any) -> Tensor:
    *_, draws, _, _, _, stride, padding, dilation, groups, _, shared, out_dtype = rest
    read = geometry(theta.shape[2:], stride, padding, dilation, groups)
    return _result(x, theta.shape[0], draws, read, shared, out_dtype)


def _result(x: Tensor, outputs: int, draws: int, read: Geometry, shared: bool, dtype: torch.dtype) -> Tensor:
    n = x.shape[0] * (draws if shared else 1)
    y = x.new_empty((n, outputs, *read.result(x.shape[2:])), dtype=dtype)
    return y.contiguous(memory_format=torch.channels_last)
