"""The kernels' twins in torch: what they compute, for devices without Triton and for tests. Slow and plain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_kernels.divergences import Divergence
from smi_kernels.divergences.reductions import reductions
from smi_kernels.epilogues import Epilogue
from smi_kernels.noise import FLIPOUT, INPUT, PARAMETERS, RANK1, Draw, Family, base, draw
from smi_kernels.noise.philox import philox


def unit_noise(
    index: Tensor, tensor: Tensor, family: Family, first: int, draws: int, seed: int, stream: int, antithetic: bool
) -> Tensor:
    """Unit noise of counters ``[B]`` in several draws, float32 ``[draws, B, elements]``."""
    rows = []
    for k in range(first, first + draws):
        which = Draw(seed=seed, k=k, stream=stream, antithetic=antithetic)
        number, last = (torch.tensor(word, device=index.device) for word in (which.number, which.stream))
        words = philox((index.long(), tensor.long(), number, last), (seed & 0xFFFFFFFF, seed >> 32))
        rows.append(which.sign * family.values(words))
    return torch.stack(rows)


def perturb_weight(
    theta: Tensor, out: Tensor, std: float, scale: Tensor | None, tensor: int, family: Family, first: int, draws: int,
    seed: int, antithetic: bool, factors: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """(θ + σ E_k) s_k of draws ``first`` on, into ``out`` ``[draws, rows, taps, channels]``."""
    rows = theta.shape[0]
    for j in range(draws):
        if factors is None:
            shapes = {tensor: theta.shape}
            options = {"seed": seed, "k": first + j, "stream": PARAMETERS, "antithetic": antithetic}
            noise = draw(family, shapes, device=theta.device, **options)[tensor]  # type: ignore[arg-type]
        elif family.structure == RANK1:
            noise = (factors[0][j][:, None] * factors[1][j]).reshape(theta.shape)
        else:
            assert family.structure == FLIPOUT
            which = Draw(seed=seed, k=0, stream=PARAMETERS)
            signs = factors[0][j].reshape(-1, 1) * factors[1][j]
            noise = base(family, theta.shape, tensor, which, theta.device)
            noise = noise * signs.reshape(*theta.shape[:2], *[1] * (theta.ndim - 2))
        weight = (theta + std * noise).reshape(rows, theta.shape[1], -1)
        if scale is not None:
            weight = weight * scale[j][:, None, None]
        out[j].copy_(weight.transpose(1, 2))


def perturb_input(
    images: Tensor, sigma: float, family: Family, first: int, draws: int, seed: int, antithetic: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """clamp(x + σ δ_k, 0, 1) for every draw, ``[draws·N, C, H, W]``, channels_last."""
    options = {"seed": seed, "stream": INPUT, "antithetic": antithetic}
    deltas = [
        draw(family, {0: images.shape[1:]}, k=first + j, device=images.device, **options)[0]  # type: ignore[arg-type]
        for j in range(draws)
    ]
    moved = torch.cat([(images + sigma * delta).clamp(0, 1) for delta in deltas])
    return moved.to(dtype, memory_format=torch.channels_last)


def _epilogue(y: Tensor, bias: Tensor | None, residual: Tensor | None, epilogue: Epilogue) -> Tensor:
    if bias is not None:
        y = y + bias.reshape(-1, *[1] * (y.ndim - 2))
    return epilogue.compute(y if residual is None else y + residual.float())


def perturbed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, draws: int, epilogue: Epilogue,
    shared: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """act(x_k W_kᵀ + b_k + residual_k) for every draw, ``[draws·M, O]``."""
    inputs = [x] * draws if shared else x.chunk(draws)
    added = [None] * draws if residual is None else residual.chunk(draws)
    rows = [
        _epilogue(F.linear(h.float(), w.float()), None if bias is None else bias[j], r, epilogue)
        for j, (h, w, r) in enumerate(zip(inputs, weight, added, strict=True))
    ]
    return torch.cat(rows).to(out_dtype)


def perturbed_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, draws: int, kernel: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int, epilogue: Epilogue, shared: bool,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """act(W_k * x_k + b_k + residual_k) for every draw, ``[draws·N, O, OH, OW]``, channels_last."""
    inputs = [x] * draws if shared else x.chunk(draws)
    added = [None] * draws if residual is None else residual.chunk(draws)
    rows = []
    for j, (h, w, r) in enumerate(zip(inputs, weight, added, strict=True)):
        full = w.float().unflatten(1, kernel).permute(0, 3, 1, 2)
        y = F.conv2d(h.float(), full, None, stride, padding, dilation, groups)
        rows.append(_epilogue(y, None if bias is None else bias[j], r, epilogue))
    return torch.cat(rows).to(out_dtype, memory_format=torch.channels_last)


def score_logits(
    clean: Tensor, perturbed: Tensor, labels: Tensor | None, divergence: Divergence, reduce: str
) -> Tensor:
    """Divergences of perturbed logits ``[K, N, C]``, reduced over the draws."""
    return reductions[reduce](torch.stack([divergence.compute(clean, q, labels) for q in perturbed], dim=1))
