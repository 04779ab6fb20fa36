"""``torch.ops.smi_kernels.unit_noise``."""

# No "from __future__ import annotations": torch reads the operator's schema from the annotations.

import torch
from torch import Tensor
from torch.library import custom_op

from smi_kernels.noise import families
from smi_kernels.ops.launch import Draws, launched
from smi_kernels.ops.unit_noise import reference


@custom_op("smi_kernels::unit_noise", mutates_args=())
def unit_noise(
    index: Tensor, tensor: Tensor, family: str, first: int, draws: int, seed_low: int, seed_high: int, stream: int,
    antithetic: bool,
) -> Tensor:  # fmt: skip
    """See `smi_kernels.ops.unit_noise.kernel`."""
    which = Draws.of(first, draws, seed_low, seed_high, antithetic)
    return launched(reference.unit_noise, index)(index, tensor, family=families[family], which=which, stream=stream)


@unit_noise.register_fake
def _(index: Tensor, tensor: Tensor, family: str, first: int, draws: int, *rest: object) -> Tensor:
    return index.new_empty((draws, index.shape[0], families[family].elements), dtype=torch.float32)
