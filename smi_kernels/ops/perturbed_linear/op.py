"""``torch.ops.smi_kernels.perturbed_linear`` and ``perturbed_linear_signs``."""

# No "from __future__ import annotations": torch reads the operators' schemas from the annotations.

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from smi_kernels.epilogues import epilogues
from smi_kernels.ops.launch import Draws, Signs, launched
from smi_kernels.ops.perturbed_linear import reference


@custom_op("smi_kernels::perturbed_linear", mutates_args=())
def perturbed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, draws: int, epilogue: str, shared: bool,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `smi_kernels.ops.perturbed_linear.kernel`."""
    return launched(reference.perturbed_linear, x)(
        x, weight, bias, residual, draws=draws, epilogue=epilogues[epilogue], shared=shared, out_dtype=out_dtype
    )


@custom_op("smi_kernels::perturbed_linear_signs", mutates_args=())
def perturbed_linear_signs(
    x: Tensor, theta: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, std: float,
    tensor: int, first: int, draws: int, seed_low: int, seed_high: int, antithetic: bool, epilogue: str, shared: bool,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `smi_kernels.ops.perturbed_linear.kernel`: Rademacher noise drawn inside the product; float32 theta."""
    which = Draws.of(first, draws, seed_low, seed_high, antithetic)
    return launched(reference.perturbed_linear, x)(
        x, theta.to(x.dtype), bias, residual, draws=draws, epilogue=epilogues[epilogue], shared=shared,
        out_dtype=out_dtype, signs=Signs(std=std, tensor=tensor, which=which, scale=scale),
    )  # fmt: skip


@perturbed_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: object, residual: object, draws: int, *rest: Any) -> Tensor:
    _, shared, out_dtype = rest
    return x.new_empty((x.shape[0] * (draws if shared else 1), weight.shape[1]), dtype=out_dtype)


@perturbed_linear_signs.register_fake
def _(x: Tensor, theta: Tensor, *rest: Any) -> Tensor:
    *_, draws, _, _, _, _, shared, out_dtype = rest
    return x.new_empty((x.shape[0] * (draws if shared else 1), theta.shape[0]), dtype=out_dtype)
