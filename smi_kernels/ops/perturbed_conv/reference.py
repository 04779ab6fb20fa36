"""Convolutions of several draws in torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_kernels.epilogues import Epilogue
from smi_kernels.ops.by_draw import by_draw, signed_weight
from smi_kernels.ops.launch import Signs
from smi_kernels.ops.perturbed_conv.shape import Geometry


def perturbed_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, draws: int,
    geometry: Geometry, epilogue: Epilogue, shared: bool = False, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """act(W_k * x_k + b_k + residual_k) for every draw, ``[draws·N, O, OH, OW]``, channels_last."""

    def product(images: Tensor, weight: Tensor) -> Tensor:
        full = weight.unflatten(1, geometry.kernel).permute(0, 3, 1, 2)
        return F.conv2d(images, full, None, *geometry.of_conv2d)

    y = by_draw(product, x, weight, bias, residual, draws=draws, epilogue=epilogue, shared=shared)
    return y.to(out_dtype or x.dtype, memory_format=torch.channels_last)


def perturbed_conv_signs(
    x: Tensor, theta: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, geometry: Geometry,
    signs: Signs, epilogue: Epilogue, shared: bool = False, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`perturbed_conv` with weights ``θ + σ sign_k``, of one θ ``[O, C / groups, KH, KW]``."""
    return perturbed_conv(
        x, signed_weight(theta, signs), bias, residual, draws=signs.which.count, geometry=geometry, epilogue=epilogue,
        shared=shared, out_dtype=out_dtype,
    )  # fmt: skip
