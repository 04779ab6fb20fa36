"""``torch.ops.smi_kernels.perturb_input``."""

# No "from __future__ import annotations": torch reads the operator's schema from the annotations.

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from smi_kernels.noise import families
from smi_kernels.ops.launch import Draws, launched
from smi_kernels.ops.perturb_input import reference


@custom_op("smi_kernels::perturb_input", mutates_args=())
def perturb_input(
    images: Tensor, sigma: float, family: str, first: int, draws: int, seed_low: int, seed_high: int,
    antithetic: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `smi_kernels.ops.perturb_input.kernel`."""
    which = Draws.of(first, draws, seed_low, seed_high, antithetic)
    perturb = launched(reference.perturb_input, images)
    return perturb(images, sigma=sigma, family=families[family], which=which, dtype=dtype)


@perturb_input.register_fake
def _(images: Tensor, sigma: float, family: str, first: int, draws: int, *rest: Any) -> Tensor:
    (n, *shape), (*_, dtype) = images.shape, rest
    return images.new_empty((draws * n, *shape), dtype=dtype).contiguous(memory_format=torch.channels_last)
