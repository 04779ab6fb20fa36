"""The loop over draws that the backends in torch share, forward and backward: one set of weights at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smi_kernels.divergences.reductions import reductions
from smi_kernels.noise import INPUT, draw
from smi_kernels.request import Request


class Scorer(Protocol):
    """A model ready to be run with the weights of any draw."""

    def weights(self, k: int | None) -> Any:
        """Weights of draw k, in whatever form `logits` takes; of the unperturbed model for None."""

    def logits(self, images: Tensor, weights: Any, *, perturbed: bool) -> Tensor:
        """Logits ``[n, C]`` in the working dtype; differentiable in the images if they require a gradient."""

    @property
    def has_noise(self) -> bool:
        """Whether any parameter gets noise."""


def score_draws(scorer: Scorer, request: Request, forward: Callable[[], Tensor] | None = None) -> Tensor:
    """Scores ``[N]``, or ``[N, K]`` if the request wants no reduction, in the working dtype.

    The gradient in the images draws the same noise again instead of keeping what the forward pass computed, so that
    memory does not grow with K.

    Args:
        scorer: runs the model, in any case in the backward pass.
        request: what is asked for.
        forward: divergences ``[N, K]`` without a gradient; by default computed with the scorer.
    """
    forward = forward or (lambda: divergences_of(scorer, request))
    if request.images.requires_grad and torch.is_grad_enabled():
        draws: Tensor = _Replay.apply(request.images, scorer, request, forward)
    else:
        with torch.no_grad():
            draws = forward()
    return reductions[request.reduce](draws)


def divergences_of(scorer: Scorer, request: Request) -> Tensor:
    """Divergence of each image under each draw, ``[N, K]``."""
    images = _chunks(request.images, request)
    weights = scorer.weights(None)
    clean = torch.cat([scorer.logits(part, weights, perturbed=False) for part in images])
    if not scorer.has_noise and request.sigma_x == 0:
        # The prediction is the clean one to the last bit; forward passes would only cost time.
        return divergences_of_draws(clean, clean.expand(request.k, *clean.shape), request)
    draws = []
    for k in range(request.k):
        if scorer.has_noise:
            del weights  # before the next are made, so that one set exists at a time
            weights = scorer.weights(k)
        delta = input_noise(request, k)
        draws.append(torch.cat([scorer.logits(_moved(part, delta), weights, perturbed=True) for part in images]))
    return divergences_of_draws(clean, torch.stack(draws), request)


def divergences_of_draws(clean: Tensor, noisy: Tensor, request: Request) -> Tensor:
    """``[N, K]`` of logits ``[N, C]`` and ``[K, N, C]``, all at once."""
    k, n, _ = noisy.shape
    labels = request.labels.long().repeat(k) if request.labels is not None else None
    return request.divergence.compute(clean.repeat(k, 1), noisy.flatten(0, 1), labels).view(k, n).T


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, scorer: Scorer, request: Request, forward: Callable[[], Tensor]) -> Tensor:
        ctx.scorer, ctx.request = scorer, request
        return forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None, None, None]:
        with torch.enable_grad():
            return _backward(ctx.scorer, ctx.request, weight), None, None, None


def _backward(scorer: Scorer, request: Request, weight: Tensor) -> Tensor:
    """Gradient of Σ weight · scores in the images; ``weight`` is ``[N, K]``."""
    images = [part.detach().requires_grad_() for part in _chunks(request.images, request)]
    labels, rows = _labels(request), weight.split(request.chunk)
    state = scorer.weights(None)
    clean = [scorer.logits(x, state, perturbed=False) for x in images]
    ends = [p.detach().requires_grad_() for p in clean]
    noise = scorer.has_noise or request.sigma_x > 0

    def accumulate(total: Tensor, leaves: Sequence[Tensor]) -> None:
        if total.requires_grad:
            torch.autograd.backward(total, inputs=list(leaves))

    for k in range(request.k):
        if scorer.has_noise:
            del state
            state = scorer.weights(k)
        delta = input_noise(request, k)
        for x, p, y, g in zip(images, ends, labels, rows, strict=True):
            q = scorer.logits(_moved(x, delta), state, perturbed=True) if noise else p
            accumulate((request.divergence.compute(p, q, y) * g[:, k]).sum(), (x, p))
    for x, p, end in zip(images, clean, ends, strict=True):
        if end.grad is not None and p.requires_grad:
            torch.autograd.backward(p, end.grad, inputs=[x])
    gradient = [x.grad if x.grad is not None else torch.zeros_like(x) for x in images]
    return torch.cat(gradient).to(request.images.dtype)


def _chunks(images: Tensor, request: Request) -> tuple[Tensor, ...]:
    # One memory layout, whatever the caller's, so that the bits depend on the values alone.
    return images.detach().to(request.working_dtype).contiguous().split(request.chunk)


def _labels(request: Request) -> Sequence[Tensor | None]:
    if request.labels is None:
        return [None] * -(-len(request.images) // request.chunk)
    return request.labels.long().split(request.chunk)


def _moved(images: Tensor, delta: Tensor | None) -> Tensor:
    return images if delta is None else (images + delta).clamp(0, 1)


def input_noise(request: Request, k: int) -> Tensor | None:
    """σ_x δ_k, ``[C, H, W]`` in pixel units; one δ_k for all images, so that no score depends on its batch."""
    if request.sigma_x == 0:
        return None
    options = {"seed": request.seed, "k": k, "stream": INPUT, "antithetic": request.antithetic}
    images = request.images
    noise = draw(request.input_family, {0: images.shape[1:]}, device=images.device, **options)[0]  # type: ignore[arg-type]
    return request.sigma_x * noise.to(request.working_dtype)
