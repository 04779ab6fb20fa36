"""Unit noise in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from smi_kernels.noise import Family
from smi_kernels.noise.philox import philox
from smi_kernels.ops.launch import Draws


def unit_noise(index: Tensor, tensor: Tensor, *, family: Family, which: Draws, stream: int) -> Tensor:
    """Unit noise of counters ``[B]`` in several draws, float32 ``[draws, B, elements]``."""
    rows = []
    for draw in which.each(stream):
        number, last = (torch.tensor(word, device=index.device) for word in (draw.number, draw.stream))
        words = philox((index.long(), tensor.long(), number, last), (draw.seed & 0xFFFFFFFF, draw.seed >> 32))
        rows.append(draw.sign * family.values(words))
    return torch.stack(rows)
