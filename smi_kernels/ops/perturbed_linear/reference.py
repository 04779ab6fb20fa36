"""Linear layers of several draws in torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_kernels.epilogues import Epilogue
from smi_kernels.ops.by_draw import by_draw, signed_weight
from smi_kernels.ops.launch import Signs


def perturbed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, draws: int,
    epilogue: Epilogue, shared: bool = False, out_dtype: torch.dtype | None = None, signs: Signs | None = None,
) -> Tensor:  # fmt: skip
    """act(x_k W_kᵀ + b_k + residual_k) for every draw, ``[draws·M, O]``."""
    weights = weight if signs is None else signed_weight(weight, signs).flatten(2)
    y = by_draw(F.linear, x, weights, bias, residual, draws=draws, epilogue=epilogue, shared=shared)
    return y.to(out_dtype or x.dtype)
