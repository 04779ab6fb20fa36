"""Independent noise, several draws at once: their convolutions are the groups of one convolution.

images   [N, draws·C, H, W]      weights   [draws·O, C, KH, KW]      groups = draws
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from smi_kernels.backends.together import Stacked, apart
from smi_kernels.epilogues import epilogues
from smi_kernels.plan import Layer

if TYPE_CHECKING:
    from smi_kernels.backends.torch import Runner


def run_layer(runner: Runner, step: Layer, ks: range, x: Any, residual: Any) -> Any:
    """See `smi_kernels.backends.together.RunLayer`."""
    weight, bias = runner.prepared.stacked(step, ks, runner.layer_dtype(step))
    module, draws = runner.modules[step.module], len(ks)
    if isinstance(module, nn.Linear):
        h = apart(x).to(weight.dtype).unflatten(0, (draws, -1))
        y = torch.bmm(h, weight.transpose(1, 2))
        y = (y if bias is None else y + bias[:, None]).flatten(0, 1)
        return epilogues[step.epilogue].compute(y if residual is None else y + apart(residual))
    assert isinstance(module, nn.Conv2d)
    h, other = _stacked(x, draws), None if residual is None else _stacked(residual, draws)
    y = runner.convolve(step, h, other, weight.flatten(0, 1), None if bias is None else bias.flatten(), draws)
    return Stacked(y, draws)


def _stacked(value: Any, draws: int) -> Tensor:
    """``[N, draws·C, H, W]`` of a value."""
    if isinstance(value, Stacked):
        return value.tensor
    side_by_side = value.unflatten(0, (draws, -1)).transpose(0, 1).flatten(1, 2)
    return side_by_side.contiguous(memory_format=torch.channels_last)
