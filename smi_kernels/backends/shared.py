"""One matrix product for all draws: noise families built of few values leave the weights shared.

With W the unperturbed weights and h the inputs of a layer, of K draws and N images at once:

    rank1     (W + σ a_k b_kᵀ) h_k = W h_k + σ a_k (b_k · h_k)
    flipout   (W + σ B ∘ s_k r_kᵀ) h_k = W h_k + σ s_k ∘ B (r_k ∘ h_k)

Sources: Wen, Tran and Ba, "BatchEnsemble", ICLR 2020; Wen et al., "Flipout", ICLR 2018. Draws are run together in
groups of as many as fit into one chunk of images, so that a few images fill the machine, and memory does not grow
with K.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_kernels.backends.loop import input_noise
from smi_kernels.epilogues import epilogues
from smi_kernels.folding import fold
from smi_kernels.layers import zero_padding
from smi_kernels.noise import INDEPENDENT, RANK1
from smi_kernels.plan import Call, Layer, Plan
from smi_kernels.reductions import reductions
from smi_kernels.request import Request, check_logits

if TYPE_CHECKING:
    from smi_kernels.backends.torch import Runner


def pays(plan: Plan, modules: dict[str, nn.Module], request: Request) -> bool:
    """Whether the draws can share the weights, and a chunk holds several draws of all images."""
    if request.family.structure == INDEPENDENT or request.sigma_w == 0 or request.k == 1:
        return False
    if request.images.requires_grad and torch.is_grad_enabled():
        return False
    if 2 * len(request.images) > request.chunk:
        return False
    return all(
        not step.reads_parameters if isinstance(step, Call) else _dense(modules[step.module]) for step, _ in plan.steps
    )


def _dense(module: nn.Module) -> bool:
    return not isinstance(module, nn.Conv2d) or module.groups == 1


@torch.no_grad()
def scores(runner: Runner, request: Request) -> Tensor:
    """Scores ``[N]``, or ``[N, K]`` if the request wants no reduction, in the working dtype."""
    images = request.images.detach().to(request.working_dtype).contiguous()
    labels = request.labels.long() if request.labels is not None else None
    clean = runner.logits(images, runner.weights(None), perturbed=False)
    group = max(1, request.chunk // len(images))
    draws = []
    for first in range(0, request.k, group):
        ks = range(first, min(first + group, request.k))
        for noisy in _group_logits(runner, request, images, ks):
            draws.append(request.divergence.compute(clean, noisy, labels))
    return reductions[request.reduce](torch.stack(draws, dim=1))


def _group_logits(runner: Runner, request: Request, images: Tensor, ks: range) -> Tensor:
    """Logits ``[draws, N, C]`` of a group of draws."""
    moved = images.expand(len(ks), *images.shape)
    if request.sigma_x > 0:
        deltas = [input_noise(request, k) for k in ks]
        moved = torch.stack([(images + d).clamp(0, 1) for d in deltas if d is not None])
    state = runner.perturbed.with_shared(runner.perturbed.clean)

    def layer(step: Layer, x: Tensor, residual: Tensor | None) -> Tensor:
        return _run_layer(runner, step, ks, x, residual)

    def call(step: Call, values: Mapping[str, Any]) -> Any:
        return runner.run_call(step, values, state)

    batch = moved.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, enabled=False):
        logits = runner.plan.run(batch, layer, call)
    check_logits(logits, request, len(batch), perturbed=True)
    return logits.to(request.working_dtype).unflatten(0, (len(ks), len(images)))


@dataclass
class _Rows:
    """Values of one layer for a group of draws, ``[draws, rows]`` each; None for a factor 1 or an addend 0."""

    weight: Tensor  # of the unperturbed layer, BatchNorm folded
    ratio: Tensor | None  # perturbed scale / unperturbed scale, less 1
    scale: Tensor | None  # perturbed scale
    bias: Tensor | None


def _rows(runner: Runner, step: Layer, ks: range) -> _Rows:
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


def _stacked(runner: Runner, name: str, ks: range) -> Tensor:
    """A parameter of one dimension under each draw, ``[draws, rows]``."""
    return torch.stack([runner.perturbed.parameter(name, k) for k in ks])


def _run_layer(runner: Runner, step: Layer, ks: range, x: Tensor, residual: Tensor | None) -> Tensor:
    model, name = runner.perturbed, f"{step.module}.weight"
    rows, dtype = _rows(runner, step, ks), runner.layer_dtype(step)
    module, std, wide = runner.modules[step.module], model.std(name), runner.request.working_dtype
    x = x.to(dtype)

    def product(h: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(dtype, memory_format=torch.channels_last if weight.ndim == 4 else torch.contiguous_format)
        if isinstance(module, nn.Linear):
            return F.linear(h, weight)
        padding = zero_padding(module)
        # What follows is a sum of few terms: in float32, so that it is rounded once.
        return F.conv2d(h, weight, None, module.stride, padding, module.dilation).to(wide)  # type: ignore[arg-type]

    def spread(values: Tensor) -> Tensor:
        """``[draws, rows]`` to the shape of the draws' outputs."""
        return values.reshape(len(ks), 1, -1, *[1] * (x.ndim - 2))

    def grouped(values: Tensor) -> Tensor:
        return values.unflatten(0, (len(ks), -1))

    moved = None
    if std == 0:
        y = grouped(product(x, rows.weight))
    elif model.family.structure == RANK1:
        # The b_k are further rows of the matrix: K of them for each draw, of which it needs one.
        firsts, seconds = zip(*(model.factors(name, k) for k in ks), strict=True)
        extra = torch.stack(seconds).reshape(len(ks), *rows.weight.shape[1:])
        both = grouped(product(x, torch.cat([rows.weight, extra.to(rows.weight.dtype)])))
        split = len(rows.weight)
        y, moved = both[:, :, :split], torch.stack([both[i, :, split + i : split + i + 1] for i in range(len(ks))])
        factor = torch.stack(firsts)
    else:
        firsts, seconds = zip(*(model.factors(name, k) for k in ks), strict=True)
        base = model.base(name)
        assert base is not None
        y = grouped(product(x, rows.weight))
        moved = grouped(product((grouped(x) * spread(torch.stack(seconds)).to(dtype)).flatten(0, 1), base))
        factor = torch.stack(firsts)

    if rows.ratio is not None:
        y = torch.addcmul(y, y, spread(rows.ratio))
    if moved is not None:
        factor = std * factor if rows.scale is None else std * factor * rows.scale
        y = torch.addcmul(y, moved, spread(factor))
    if rows.bias is not None:
        y = y + spread(rows.bias.expand(len(ks), -1))
    y = y.flatten(0, 1)
    if residual is not None:
        y = y + residual.to(y.dtype)
    y = epilogues[step.epilogue].compute(y)
    return y.to(dtype)
