"""The reference: a loop over draws of ``torch.func.functional_call``, on any module and any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from smi_kernels.noise import INPUT, draw
from smi_kernels.perturbed import PerturbedModel
from smi_kernels.request import Request, check_logits


def supports(model: nn.Module, request: Request) -> bool:
    """The reference supports whatever passed the checks."""
    return True


def scores(model: nn.Module, request: Request) -> Tensor:
    """Divergence of each image under each draw, ``[N, K]``, float32 or float64; see `smi_kernels.stability_scores`.

    Draws are the outer loop, so that one set of perturbed parameters exists at a time and serves all chunks.
    """
    perturbed = PerturbedModel(
        model,
        sigma=request.sigma_w,
        family=request.family,
        seed=request.seed,
        antithetic=request.antithetic,
        parameters=request.parameters,
        dtype=request.working_dtype,
    )
    # One memory layout, whatever the caller's, so that the bits depend on the values alone.
    images = request.images.to(request.working_dtype).contiguous().split(request.chunk)
    labels: Iterable[Tensor | None] = [None] * len(images)
    if request.labels is not None:
        labels = request.labels.long().split(request.chunk)
    clean = [_logits(model, perturbed.clean, part, request, perturbed=False) for part in images]

    draws = []
    for k in range(request.k):
        # Without any noise the prediction is the clean one to the last bit; a second forward pass would only cost time.
        noisy = clean
        if perturbed.has_noise or request.sigma_x > 0:
            state, delta = perturbed.state(k), _input_noise(request, k)
            noisy = [_logits(model, state, (x + delta).clamp(0, 1), request, perturbed=True) for x in images]
        parts = zip(clean, noisy, labels, strict=True)
        draws.append(torch.cat([request.divergence.compute(p, q, y) for p, q, y in parts]))
    return torch.stack(draws, dim=1)


def _input_noise(request: Request, k: int) -> Tensor:
    """σ_x δ_k, ``[C, H, W]`` in pixel units; one δ_k for all images, so that no score depends on its batch."""
    shape, device = request.images.shape[1:], request.images.device
    if request.sigma_x == 0:
        return torch.zeros((), dtype=request.working_dtype, device=device)
    noise = draw(
        request.input_family,
        {0: shape},
        seed=request.seed,
        k=k,
        stream=INPUT,
        antithetic=request.antithetic,
        device=device,
    )[0]
    return request.sigma_x * noise.to(request.working_dtype)


def _logits(model: nn.Module, state: dict[str, Tensor], images: Tensor, request: Request, *, perturbed: bool) -> Tensor:
    """Logits ``[n, C]`` in the working dtype."""
    low = request.dtype == torch.bfloat16
    images = images.contiguous(memory_format=torch.channels_last)
    # Also for float32, to leave an autocast region of the caller.
    ends = _Float32Ends(images.shape[1]) if low else nullcontext()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=low), ends:
        logits = functional_call(model, state, (images,))
    check_logits(logits, request, len(images), perturbed=perturbed)
    return logits.to(request.working_dtype)


class _Float32Ends(TorchFunctionMode):
    """Runs a model's two ends outside autocast: convolutions of the image, and linear layers on features ``[N, F]``.

    Both are a small share of the work and the places where rounding to bfloat16 hurts most. It moves a pixel by a
    few hundredths of a typical δ, and a logit of size 10 by 0.02, which is more than δ moves those of a stable image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._channels = channels

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._is_end(func, args):
            return func(*args, **kwargs)
        with torch.autocast(args[0].device.type, enabled=False):
            return func(args[0].float(), *args[1:], **kwargs)

    def _is_end(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        if not args:
            return False
        if func is F.linear:
            return args[0].ndim == 2
        return func is F.conv2d and args[0].shape[1] == self._channels
