"""One matrix product for all draws: noise families built of few values leave the weights shared.

With W the unperturbed weights and h the inputs of a layer, of K draws and N images at once:

    rank1     (W + σ a_k b_kᵀ) h_k = W h_k + σ a_k (b_k · h_k)
    flipout   (W + σ B ∘ s_k r_kᵀ) h_k = W h_k + σ s_k ∘ B (r_k ∘ h_k)

Sources: Wen, Tran and Ba, "BatchEnsemble", ICLR 2020; Wen et al., "Flipout", ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_kernels.epilogues import epilogues
from smi_kernels.graph.folding import fold
from smi_kernels.graph.layers import zero_padding
from smi_kernels.graph.plan import Layer, Plan
from smi_kernels.noise import INDEPENDENT, RANK1
from smi_kernels.noise.perturbed_model import PerturbedModel
from smi_kernels.request import Request

if TYPE_CHECKING:
    from smi_kernels.backends.torch import Runner


def shares(plan: Plan, modules: dict[str, nn.Module], request: Request) -> bool:
    """Whether the draws can share the weights."""
    if request.family.structure == INDEPENDENT or request.sigma_w == 0:
        return False
    return all(_dense(modules[step.module]) for step, _ in plan.steps if isinstance(step, Layer))


def _dense(module: nn.Module) -> bool:
    return not isinstance(module, nn.Conv2d) or module.groups == 1


@dataclass
class _Rows:
    """Values of one layer for a group of draws, ``[draws, rows]`` each; None for a factor 1 or an addend 0."""

    weight: Tensor  # of the unperturbed layer, BatchNorm folded
    ratio: Tensor | None  # perturbed scale / unperturbed scale, less 1
    scale: Tensor | None  # perturbed scale
    bias: Tensor | None


def _rows(runner: Runner, step: Layer, ks: Sequence[int | None]) -> _Rows:
    model, norm = runner.perturbed, runner.modules[step.norm] if step.norm is not None else None
    names = [f"{m}.{p}" for m in (step.module, step.norm) if m is not None for p in ("weight", "bias")]
    clean = model.with_shared(model.clean)
    stacked = {n: _stacked(runner, n, ks) for n in names if n in clean and clean[n].ndim == 1}
    scale, bias = fold(step, norm, clean | stacked)
    weight = clean[f"{step.module}.weight"]
    if scale is None:
        return _Rows(weight, None, None, bias)
    plain, _ = fold(step, norm, clean)
    assert plain is not None
    plain = torch.where(plain == 0, 1.0, plain)  # the noise on a γ of 0 must reach something
    weight = weight * plain.reshape(-1, *[1] * (weight.ndim - 1))
    return _Rows(weight, scale / plain - 1, scale, bias)


def _stacked(runner: Runner, name: str, ks: Sequence[int | None]) -> Tensor:
    """A parameter of one dimension under each draw, ``[draws, rows]``."""
    model = runner.perturbed
    clean = model.clean[model.first_name(name)]
    return torch.stack([clean if k is None else model.parameter(name, k) for k in ks])


def _factors(model: PerturbedModel, name: str, ks: Sequence[int | None]) -> tuple[list[Tensor], list[Tensor]]:
    """The two factors of each draw's noise; without noise the first is 0."""
    pairs = [model.factors(name, k or 0) for k in ks]
    firsts = [torch.zeros_like(a) if k is None else a for k, (a, _) in zip(ks, pairs, strict=True)]
    return firsts, [b for _, b in pairs]


def run_layer(runner: Runner, step: Layer, ks: Sequence[int | None], x: Tensor, residual: Tensor | None) -> Tensor:
    """See `smi_kernels.backends.together.RunLayer`."""
    rows, dtype = _rows(runner, step, ks), runner.layer_dtype(step)
    std = runner.perturbed.std(f"{step.module}.weight")

    def spread(values: Tensor) -> Tensor:
        """``[draws, rows]`` to the shape of the draws' outputs."""
        return values.reshape(len(ks), 1, -1, *[1] * (x.ndim - 2))

    y, noise = _products(runner, step, ks, x.to(dtype), rows.weight)
    if rows.ratio is not None:
        y = torch.addcmul(y, y, spread(rows.ratio))
    if noise is not None:
        moved, factor = noise
        factor = std * factor if rows.scale is None else std * factor * rows.scale
        y = torch.addcmul(y, moved, spread(factor))
    if rows.bias is not None:
        y = y + spread(rows.bias.expand(len(ks), -1))
    y = y.flatten(0, 1)
    if residual is not None:
        y = y + residual.to(y.dtype)
    y = epilogues[step.epilogue].compute(y)
    return y.to(dtype)


def _products(
    runner: Runner, step: Layer, ks: Sequence[int | None], x: Tensor, weight: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """W h_k, and of the noise b_k · h_k with its factor a_k, or B (r_k ∘ h_k) with s_k; ``[draws, N, ...]``."""
    model, name, k = runner.perturbed, f"{step.module}.weight", len(ks)

    def product(h: Tensor, weight: Tensor) -> Tensor:
        return _product(runner, step, h, weight).unflatten(0, (k, -1))

    if model.std(name) == 0:
        return product(x, weight), None
    firsts, seconds = (torch.stack(values) for values in _factors(model, name, ks))
    if model.family.structure == RANK1:
        # The b_k are further rows of the matrix: K of them for each draw, of which it needs one.
        extra, split = seconds.reshape(k, *weight.shape[1:]).to(weight.dtype), len(weight)
        both = product(x, torch.cat([weight, extra]))
        own = torch.stack([both[i, :, split + i : split + i + 1] for i in range(k)])
        return both[:, :, :split], (own, firsts)
    base = model.base(name)
    assert base is not None
    signs = seconds.reshape(k, 1, -1, *[1] * (x.ndim - 2)).to(x.dtype)
    signed = (x.unflatten(0, (k, -1)) * signs).flatten(0, 1)
    return product(x, weight), (product(signed, base), firsts)


def _product(runner: Runner, step: Layer, x: Tensor, weight: Tensor) -> Tensor:
    module = runner.modules[step.module]
    weight = weight.to(x.dtype, memory_format=torch.channels_last if weight.ndim == 4 else torch.contiguous_format)
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    y = F.conv2d(x, weight, None, module.stride, zero_padding(module), module.dilation)  # type: ignore[arg-type]
    # What follows is a sum of few terms: in float32, so that it is rounded once.
    return y.to(runner.request.working_dtype)
