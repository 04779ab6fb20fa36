"""Independent noise, several draws at once: each layer makes their weights in C, then convolves all of them in C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smi_kernels import native
from smi_kernels.backends.prepared import prepares
from smi_kernels.epilogues import epilogues
from smi_kernels.graph.layers import zero_padding
from smi_kernels.graph.plan import Layer
from smi_kernels.request import Request

if TYPE_CHECKING:
    from smi_kernels.backends.torch import Runner

FUSED = ("identity", "relu")
"""Epilogues that the convolution in C applies."""


def fuses(request: Request) -> bool:
    """Whether the C library can run a request, and is fast on this processor."""
    return prepares(request) and native.convolves(request.dtype) and native.convolves(request.working_dtype)


def run_layer(runner: Runner, step: Layer, ks: Sequence[int | None], x: Tensor, residual: Tensor | None) -> Tensor:
    """See `smi_kernels.backends.together.RunLayer`."""
    part = len(x) < len(ks) * len(runner.request.images)
    weight, bias = runner.prepared.stacked(step, ks, runner.layer_dtype(step), keep=part)
    module, draws, activation = runner.modules[step.module], len(ks), epilogues[step.epilogue].compute
    x = x.to(weight.dtype)
    if isinstance(module, nn.Linear):
        y = torch.bmm(x.unflatten(0, (draws, -1)), weight.transpose(1, 2))
        y = (y if bias is None else y + bias[:, None]).flatten(0, 1)
        return activation(y if residual is None else y + residual)
    assert isinstance(module, nn.Conv2d)
    if module.groups != 1:
        return _one_by_one(runner, step, x, residual, weight, bias)
    dtype = runner.request.dtype if runner.plan.feeds_layer(step.output) else runner.request.working_dtype
    y = native.convolve(
        x if x.is_contiguous() else x.contiguous(memory_format=torch.channels_last),
        weight,
        bias,
        None if residual is None else residual.to(dtype).contiguous(memory_format=torch.channels_last),
        stride=module.stride,  # type: ignore[arg-type]
        padding=zero_padding(module),  # type: ignore[arg-type]
        dilation=module.dilation,  # type: ignore[arg-type]
        relu=step.epilogue == "relu",
        dtype=dtype,
    )
    return y if step.epilogue in FUSED else activation(y)


def _one_by_one(
    runner: Runner, step: Layer, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """A convolution with groups, which the C library does not know."""
    draws = len(weight)
    others = [None] * draws if residual is None else residual.chunk(draws)
    made = [
        runner.convolve(step, own, other, weight[i].permute(0, 3, 1, 2), None if bias is None else bias[i])
        for i, (own, other) in enumerate(zip(x.chunk(draws), others, strict=True))
    ]
    return torch.cat(made)
