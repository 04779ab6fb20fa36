"""Stability scores: how far a model's prediction moves under random noise on the image and on the parameters."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from smi_kernels.backends import backends, choose_backend
from smi_kernels.divergences import divergences
from smi_kernels.divergences.reductions import reductions
from smi_kernels.errors import InputError, unknown_name
from smi_kernels.noise import families
from smi_kernels.noise.perturbed_model import ParameterFilter
from smi_kernels.plugins import load_plugins
from smi_kernels.precision import resolve_dtype
from smi_kernels.request import Request, check_images, check_model


def stability_scores(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    k: int = 16,
    sigma_x: float,
    sigma_w: float,
    family: str = "gaussian",
    input_family: str = "gaussian",
    divergence: str = "kl",
    antithetic: bool = False,
    seed: int = 0,
    reduce: str = "mean",
    dtype: str | torch.dtype = "auto",
    chunk: int | str = "auto",
    parameters: ParameterFilter = None,
    backend: str = "auto",
) -> Tensor:
    """Score the stability of a model's prediction on each image. Lower is more stable.

        S(x) = 1/K Σ_k div( f_θ(x), f_{θ+v_k}(clamp(x + δ_k, 0, 1)) )

    δ_k and v_k are shared by all images, so the score of an image depends neither on the order nor on the rest of the
    batch (up to rounding: a matrix product may sum in another order for another batch size). The same arguments give
    the same bits. The model is not changed.

    Differentiable once in ``images`` if they require a gradient and gradients are enabled. The backward pass draws
    the same noise again, so that memory does not grow with k.

    The first call for a model records its forward pass; convolutions, linear layers and BatchNorm are then run folded
    and fused. A layer type that is not known (see `register_layer`), or a forward pass whose course depends on values,
    is run by a slower path, with one warning.

    Args:
        model: maps images ``[N, C, H, W]`` to logits ``[N, classes]``; in eval mode.
        images: ``[N, C, H, W]``, floating point, in [0, 1], on the model's device.
        labels: ``[N]`` integers; needed by the divergences ``cross_entropy`` and ``margin``.
        k: number of draws K ≥ 1.
        sigma_x: standard deviation ≥ 0 of the noise on each pixel, in pixel units. 0: no noise on the image.
        sigma_w: standard deviation ≥ 0 of the noise on parameter tensor l, in units of ‖θ_l‖ / √(elements of l).
            0: no noise on the parameters.
        family: noise on the parameters, by name in `smi_kernels.noise.families`: ``gaussian``, ``rademacher``,
            ``rank1`` or ``flipout``.
        input_family: noise on the image, likewise.
        divergence: by name in `smi_kernels.divergences.divergences`: ``kl``, ``cross_entropy``,
            ``total_variation``, ``margin`` or ``flip``. All but ``cross_entropy`` are 0 without noise.
        antithetic: draw pairs (+E, −E), which cancels odd orders; k must be even.
        seed: of the noise, in [0, 2⁶⁴).
        reduce: over the draws: ``mean``, ``max``, or ``none`` for all of them, ``[N, K]``.
        dtype: ``bfloat16``, ``float16``, ``float32`` or ``float64`` (or the torch dtype) for the model's forward pass;
            convolutions of the image and linear layers on features stay in float32 with the first two. ``auto``:
            float64 for a float64 model, else bfloat16 where the hardware has it, else float32. Logits and divergence
            are float32, or float64 if that is the dtype.
        chunk: images in one forward pass, or ``auto``. Changes no noise.
        parameters: which parameters get noise: None for all, a function of the name, or names and prefixes.
        backend: ``triton`` (fused kernels, on a CUDA device), ``torch`` (any device), ``reference`` (the model as it
            is, draw by draw), or ``auto``, the first of these that can do it. The environment variable
            SMI_KERNELS_BACKEND replaces ``auto``.

    Returns:
        Scores ``[N]`` (``[N, K]`` for ``reduce="none"``), float32; float64 if that is the dtype.

    Raises:
        InputError: for anything that cannot be used; says what was wrong, what is allowed and what to try.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
    >>> images, labels = torch.rand(5, 1, 8, 8), torch.zeros(5, dtype=torch.int64)
    >>> stability_scores(model, images, labels, k=4, sigma_x=0.1, sigma_w=0.1).shape
    torch.Size([5])
    """
    name, request = _request(
        model, images, labels, k=k, sigma_x=sigma_x, sigma_w=sigma_w, family=family, input_family=input_family,
        divergence=divergence, antithetic=antithetic, seed=seed, reduce=reduce, dtype=dtype, chunk=chunk,
        parameters=parameters, backend=backend,
    )  # fmt: skip
    return backends[name].scores(model, request)


def which_backend(model: nn.Module, images: Tensor, labels: Tensor | None = None, **options: Any) -> str:
    """Name of the backend that `stability_scores` would use with the same arguments, for records. Same errors."""
    defaults = {
        name: p.default for name, p in signature(stability_scores).parameters.items() if p.kind == p.KEYWORD_ONLY
    }
    return _request(model, images, labels, **(defaults | options))[0]


def _request(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    *,
    family: str,
    input_family: str,
    divergence: str,
    reduce: str,
    dtype: str | torch.dtype,
    chunk: int | str,
    backend: str,
    **numbers: Any,
) -> tuple[str, Request]:
    """Name of the backend, and the request with names resolved."""
    load_plugins()
    check_images(images)
    check_model(model, images)
    if reduce not in reductions:
        raise unknown_name("reduction", reduce, reductions)
    request = Request(
        images=images,
        labels=labels,
        family=families[family],
        input_family=families[input_family],
        divergence=divergences[divergence],
        dtype=resolve_dtype(dtype, model, images),
        chunk=_resolve_chunk(chunk, images),
        reduce=reduce,
        **numbers,
    )
    return choose_backend(backend, model, request), request


def _resolve_chunk(chunk: int | str, images: Tensor) -> int:
    """Images in one forward pass. ``auto``: 2¹⁷ pixels; fewer stay nearer the cache, more keep threads busier."""
    if chunk == "auto":
        return max(1, 2**17 // images[0, 0].numel())
    if isinstance(chunk, str):
        raise InputError(f"chunk is {chunk!r}. Allowed: a number of images from 1 up, or 'auto'.")
    return chunk
