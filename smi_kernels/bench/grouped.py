"""G perturbed copies of a benchmark model as one model: grouped convolutions with the BatchNorms folded into them.

Only for the layers that the benchmark's own models have. With one group it is the folded model itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_kernels.bench.models import Normalised, Residual

State = Mapping[str, Tensor]
"""Parameters by name, each ``[G, *shape]`` in float32."""


def grouped_logits(model: Normalised, state: State, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of G copies of a model in eval mode.

    Args:
        model: gives the structure and the BatchNorm statistics.
        state: the parameters of the copies.
        images: ``[G, N, C, H, W]``, not normalised: each copy has its own.
        dtype: of the convolutions. Folding is float32 at least, and so is the last layer.

    Returns:
        ``[G, N, classes]``, float32, or float64 if that is the dtype of the state.
    """
    groups = len(images)
    x = ((images - model.mean) / model.std).transpose(0, 1).flatten(1, 2)
    layout = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    return _sequential(model.body, "body.", x.to(dtype, memory_format=layout), state, groups)


def _sequential(modules: nn.Sequential, prefix: str, x: Tensor, state: State, groups: int) -> Tensor:
    layers = list(modules)
    for i, layer in enumerate(layers):
        name = f"{prefix}{i}."
        if isinstance(layer, nn.Conv2d):
            norm = layers[i + 1]
            assert isinstance(norm, nn.BatchNorm2d)
            weight, bias = _folded(state[f"{name}weight"], norm, f"{prefix}{i + 1}.", state)
            x = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), layer.stride, layer.padding, groups=groups)
        elif isinstance(layer, nn.Linear):
            weight, bias = state[f"{name}weight"], state[f"{name}bias"]
            features = x.to(weight.dtype).unflatten(1, (groups, -1)).transpose(0, 1)
            x = torch.baddbmm(bias[:, None], features, weight.transpose(1, 2))
        elif isinstance(layer, nn.Sequential):
            x = _sequential(layer, name, x, state, groups)
        elif isinstance(layer, Residual):
            main = _sequential(layer.main, f"{name}main.", x, state, groups)
            x = F.relu(main + _sequential(layer.shortcut, f"{name}shortcut.", x, state, groups))
        elif not isinstance(layer, nn.BatchNorm2d):  # those are in the convolutions
            x = layer(x)  # acts on each channel alone, so that groups do not matter
    return x


def _folded(weight: Tensor, norm: nn.BatchNorm2d, prefix: str, state: State) -> tuple[Tensor, Tensor]:
    """Weight ``[G·O, I, h, w]`` and bias ``[G·O]`` of G convolutions ``[G, O, I, h, w]`` with BatchNorm behind them."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = state[f"{prefix}weight"] * torch.rsqrt(norm.running_var + norm.eps)
    bias = state[f"{prefix}bias"] - norm.running_mean * scale
    return (weight * scale[:, :, None, None, None]).flatten(0, 1), bias.flatten()
