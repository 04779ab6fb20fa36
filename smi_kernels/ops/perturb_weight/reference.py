"""Perturbed weights in torch."""

from __future__ import annotations

from torch import Tensor

from smi_kernels.noise import FLIPOUT, PARAMETERS, RANK1, Draw, Family, base, draw
from smi_kernels.ops.launch import Draws


def perturb_weight(
    theta: Tensor, out: Tensor, *, std: float, scale: Tensor | None = None, tensor: int, family: Family, which: Draws,
    factors: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """(θ + σ E_k) s_k of several draws, into ``out`` ``[draws, rows, taps, channels]``."""
    rows = theta.shape[0]
    for j, one in enumerate(which.each(PARAMETERS)):
        if factors is None:
            noise = draw(family, {tensor: theta.shape}, device=theta.device, **vars(one))[tensor]
        elif family.structure == RANK1:
            noise = (factors[0][j][:, None] * factors[1][j]).reshape(theta.shape)
        else:
            assert family.structure == FLIPOUT
            signs = factors[0][j].reshape(-1, 1) * factors[1][j]
            noise = base(family, theta.shape, tensor, Draw(seed=which.seed, k=0, stream=PARAMETERS), theta.device)
            noise = noise * signs.reshape(*theta.shape[:2], *[1] * (theta.ndim - 2))
        weight = (theta + std * noise).reshape(rows, theta.shape[1], -1)
        if scale is not None:
            weight = weight * scale[j][:, None, None]
        out[j].copy_(weight.transpose(1, 2))
