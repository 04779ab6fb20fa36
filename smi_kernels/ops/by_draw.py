"""What the references of linear layers and convolutions share: one draw after the other, in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smi_kernels.epilogues import Epilogue
from smi_kernels.noise import families
from smi_kernels.ops.launch import Signs
from smi_kernels.ops.perturb_weight.reference import perturb_weight


def by_draw(
    product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, *, draws: int, epilogue: Epilogue, shared: bool,
) -> Tensor:  # fmt: skip
    """act(product(x_k, W_k) + b_k + residual_k) for every draw, in float32."""
    inputs = [x] * draws if shared else x.chunk(draws)
    added = [None] * draws if residual is None else residual.chunk(draws)
    made = []
    for j, (h, w, r) in enumerate(zip(inputs, weight, added, strict=True)):
        y = product(h.float(), w.float())
        if bias is not None:
            y = y + bias[j].reshape(-1, *[1] * (y.ndim - 2))
        made.append(epilogue.compute(y if r is None else y + r.float()))
    return torch.cat(made)


def signed_weight(theta: Tensor, signs: Signs) -> Tensor:
    """Weights with Rademacher noise in θ's dtype, times the scale: ``[draws, rows, taps, channels]``, float32."""
    weight = theta.new_empty(signs.which.count, theta.shape[0], theta[0, 0].numel(), theta.shape[1])
    where = {"tensor": signs.tensor, "family": families["rademacher"], "which": signs.which}
    perturb_weight(theta.float(), weight, std=signs.std, **where)  # type: ignore[arg-type]
    return weight.float() if signs.scale is None else weight.float() * signs.scale[:, :, None, None]
