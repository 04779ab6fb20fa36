"""A layer's perturbed weights as one matrix and one vector: BatchNorm folded in after the noise was added."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from smi_kernels.graph.plan import Layer


def fold(layer: Layer, norm: nn.Module | None, state: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Scale s and bias b of y = s (W x) + b, for a layer with the weights W in ``state``.

    s = γ / √(var + ε) and b = s (b₀ − mean) + β; without a BatchNorm s is None and b = b₀.

    Args:
        layer: a layer of a plan.
        norm: its BatchNorm, if any, for ε.
        state: parameters and buffers by name. Those of several draws may be stacked: ``[..., rows]``.

    Returns:
        Both ``[..., rows]``; None stands for a factor 1 and a bias 0.
    """
    bias = state.get(f"{layer.module}.bias")
    if norm is None:
        return None, bias
    mean, var = state[f"{layer.norm}.running_mean"], state[f"{layer.norm}.running_var"]
    scale = torch.rsqrt(var + float(norm.eps))  # type: ignore[arg-type]
    gamma, beta = state.get(f"{layer.norm}.weight"), state.get(f"{layer.norm}.bias")
    if gamma is not None:
        scale = scale * gamma
    shift = scale * (-mean if bias is None else bias - mean)
    return scale, shift if beta is None else shift + beta
