"""The kernels as torch operators, ``torch.ops.smi_kernels.*``: Triton where it runs, their twins elsewhere.

As operators they have fake implementations, so that ``torch.compile`` keeps them whole in one graph. Families,
divergences and epilogues go by their registered names, seeds as two 32-bit words, low first, because operators take
signed integers.
"""

# No "from __future__ import annotations": torch reads the operators' schemas from the annotations.

import torch
from torch import Tensor
from torch.library import custom_op

from smi_kernels.divergences import divergences
from smi_kernels.epilogues import epilogues
from smi_kernels.noise import families
from smi_kernels.ops import launch as kernels, twins
from smi_kernels.registry import load_kernel


def _compiled(tensor: Tensor) -> bool:
    return tensor.is_cuda or kernels.interpreting()


def _seed(low: int, high: int) -> int:
    return low | high << 32


@custom_op("smi_kernels::unit_noise", mutates_args=())
def unit_noise(
    index: Tensor, tensor: Tensor, family: str, first: int, draws: int, seed_low: int, seed_high: int, stream: int,
    antithetic: bool,
) -> Tensor:  # fmt: skip
    """See `smi_kernels.ops.unit_noise.kernel`."""
    source, seed = families[family], _seed(seed_low, seed_high)
    if not _compiled(index):
        return twins.unit_noise(index, tensor, source, first, draws, seed, stream, antithetic)
    from smi_kernels.ops.unit_noise.kernel import unit_noise as launch

    return launch(
        index, tensor, family=source, first=first, draws=draws, seed=seed, stream=stream, antithetic=antithetic
    )


@unit_noise.register_fake
def _(
    index: Tensor, tensor: Tensor, family: str, first: int, draws: int, seed_low: int, seed_high: int, stream: int,
    antithetic: bool,
) -> Tensor:  # fmt: skip
    return index.new_empty((draws, index.shape[0], families[family].elements), dtype=torch.float32)


@custom_op("smi_kernels::perturb_weight", mutates_args={"out"})
def perturb_weight(
    theta: Tensor, out: Tensor, std: float, scale: Tensor | None, tensor: int, family: str, first: int, draws: int,
    seed_low: int, seed_high: int, antithetic: bool, left: Tensor | None, right: Tensor | None,
) -> None:  # fmt: skip
    """See `smi_kernels.ops.perturb_weight.kernel`; left and right are the factors of a structured family, or None."""
    source, seed = families[family], _seed(seed_low, seed_high)
    factors = (left, right) if left is not None and right is not None else None
    if not _compiled(theta):
        twins.perturb_weight(theta, out, std, scale, tensor, source, first, draws, seed, antithetic, factors)
        return
    from smi_kernels.ops.perturb_weight.kernel import perturb_weight as launch

    launch(
        theta, out, std=std, scale=scale, tensor=tensor, family=source, first=first, draws=draws, seed=seed,
        antithetic=antithetic, structure=source.structure, factors=factors,
    )  # fmt: skip


@perturb_weight.register_fake
def _(
    theta: Tensor, out: Tensor, std: float, scale: Tensor | None, tensor: int, family: str, first: int, draws: int,
    seed_low: int, seed_high: int, antithetic: bool, left: Tensor | None, right: Tensor | None,
) -> None:  # fmt: skip
    return None


@custom_op("smi_kernels::perturb_input", mutates_args=())
def perturb_input(
    images: Tensor, sigma: float, family: str, first: int, draws: int, seed_low: int, seed_high: int,
    antithetic: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `smi_kernels.ops.perturb_input.kernel`."""
    source, seed = families[family], _seed(seed_low, seed_high)
    if not _compiled(images):
        return twins.perturb_input(images, sigma, source, first, draws, seed, antithetic, dtype)
    from smi_kernels.ops.perturb_input.kernel import perturb_input as launch

    return launch(
        images, sigma=sigma, family=source, first=first, draws=draws, seed=seed, antithetic=antithetic, dtype=dtype
    )


@perturb_input.register_fake
def _(
    images: Tensor, sigma: float, family: str, first: int, draws: int, seed_low: int, seed_high: int,
    antithetic: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    n, *shape = images.shape
    return images.new_empty((draws * n, *shape), dtype=dtype).contiguous(memory_format=torch.channels_last)


@custom_op("smi_kernels::perturbed_linear", mutates_args=())
def perturbed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, draws: int, epilogue: str, shared: bool,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `smi_kernels.ops.perturbed_linear.kernel`."""
    activation = epilogues[epilogue]
    if not _compiled(x):
        return twins.perturbed_linear(x, weight, bias, residual, draws, activation, shared, out_dtype)
    from smi_kernels.ops.perturbed_linear.kernel import perturbed_linear as launch

    return launch(
        x, weight, bias, residual, draws=draws, epilogue=load_kernel(activation.kernel), shared=shared,
        out_dtype=out_dtype,
    )  # fmt: skip


@perturbed_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, draws: int, epilogue: str, shared: bool,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0] * (draws if shared else 1), weight.shape[1]), dtype=out_dtype)


@custom_op("smi_kernels::perturbed_conv", mutates_args=())
def perturbed_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, draws: int, kernel: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int, epilogue: str, shared: bool,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `smi_kernels.ops.perturbed_conv.kernel`."""
    activation = epilogues[epilogue]
    if not _compiled(x):
        return twins.perturbed_conv(
            x, weight, bias, residual, draws, kernel, stride, padding, dilation, groups, activation, shared, out_dtype
        )
    from smi_kernels.ops.perturbed_conv.kernel import perturbed_conv as launch

    return launch(
        x, weight, bias, residual, draws=draws, kernel_size=_pair(kernel), stride=_pair(stride),
        padding=_pair(padding), dilation=_pair(dilation), groups=groups, epilogue=load_kernel(activation.kernel),
        shared=shared, out_dtype=out_dtype,
    )  # fmt: skip


@perturbed_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, draws: int, kernel: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int, epilogue: str, shared: bool,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _conv_result(x, weight.shape[1], draws, kernel, stride, padding, dilation, shared, out_dtype)


@custom_op("smi_kernels::perturbed_linear_signs", mutates_args=())
def perturbed_linear_signs(
    x: Tensor, theta: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, std: float,
    tensor: int, first: int, draws: int, seed_low: int, seed_high: int, antithetic: bool, epilogue: str, shared: bool,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `smi_kernels.ops.perturbed_linear.kernel`: Rademacher noise drawn inside the product; float32 theta."""
    activation, seed = epilogues[epilogue], _seed(seed_low, seed_high)
    if not _compiled(x):
        weight = _signed(theta, x, std, tensor, first, draws, seed, antithetic, scale)
        return twins.perturbed_linear(x, weight.flatten(2), bias, residual, draws, activation, shared, out_dtype)
    from smi_kernels.ops.perturbed_linear.kernel import perturbed_linear_signs as launch

    return launch(
        x, theta.to(x.dtype), scale, bias, residual, std=std, tensor=tensor, first=first, draws=draws, seed=seed,
        antithetic=antithetic, epilogue=load_kernel(activation.kernel), shared=shared, out_dtype=out_dtype,
    )  # fmt: skip


@perturbed_linear_signs.register_fake
def _(
    x: Tensor, theta: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, std: float,
    tensor: int, first: int, draws: int, seed_low: int, seed_high: int, antithetic: bool, epilogue: str, shared: bool,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0] * (draws if shared else 1), theta.shape[0]), dtype=out_dtype)


@custom_op("smi_kernels::perturbed_conv_signs", mutates_args=())
def perturbed_conv_signs(
    x: Tensor, theta: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, std: float,
    tensor: int, first: int, draws: int, seed_low: int, seed_high: int, antithetic: bool, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, epilogue: str, shared: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `smi_kernels.ops.perturbed_conv.kernel`: one bit a weight, expanded inside the product; float32 theta."""
    activation, seed = epilogues[epilogue], _seed(seed_low, seed_high)
    rows, channels, *kernel = theta.shape
    if not _compiled(x):
        weight = _signed(theta, x, std, tensor, first, draws, seed, antithetic, scale)
        return twins.perturbed_conv(
            x, weight, bias, residual, draws, kernel, stride, padding, dilation, groups, activation, shared, out_dtype
        )
    from smi_kernels.ops.perturbed_conv.kernel import perturbed_conv_signs as launch
    from smi_kernels.ops.perturbed_conv.pack_signs import pack_signs

    signs = pack_signs(
        rows, channels, kernel[0] * kernel[1], tensor=tensor, first=first, draws=draws, seed=seed,
        antithetic=antithetic, device=x.device,
    )  # fmt: skip
    return launch(
        x, theta.flatten(2).transpose(1, 2).to(x.dtype).contiguous(), signs, scale, bias, residual, std=std,
        draws=draws, kernel_size=_pair(kernel), stride=_pair(stride), padding=_pair(padding),
        dilation=_pair(dilation), groups=groups, epilogue=load_kernel(activation.kernel), shared=shared,
        out_dtype=out_dtype,
    )  # fmt: skip


@perturbed_conv_signs.register_fake
def _(
    x: Tensor, theta: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, std: float,
    tensor: int, first: int, draws: int, seed_low: int, seed_high: int, antithetic: bool, stride: list[int],
    padding: list[int], dilation: list[int], groups: int, epilogue: str, shared: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    kernel = list(theta.shape[2:])
    return _conv_result(x, theta.shape[0], draws, kernel, stride, padding, dilation, shared, out_dtype)


@custom_op("smi_kernels::score_logits", mutates_args=())
def score_logits(clean: Tensor, perturbed: Tensor, labels: Tensor | None, divergence: str, reduce: str) -> Tensor:
    """See `smi_kernels.ops.score_logits.kernel`."""
    measure = divergences[divergence]
    if not _compiled(clean):
        return twins.score_logits(clean, perturbed, labels, measure, reduce).contiguous()
    from smi_kernels.ops.score_logits.kernel import score_logits as launch

    return launch(clean, perturbed, labels, divergence=measure, reduce=reduce)


@score_logits.register_fake
def _(clean: Tensor, perturbed: Tensor, labels: Tensor | None, divergence: str, reduce: str) -> Tensor:
    k, n, _ = perturbed.shape
    return clean.new_empty((n, k) if reduce == "none" else (n,))


def _signed(
    theta: Tensor, x: Tensor, std: float, tensor: int, first: int, draws: int, seed: int, antithetic: bool,
    scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """Weights with Rademacher noise in x's format, times the scale, ``[draws, rows, taps, channels]``, float32."""
    rows, channels = theta.shape[:2]
    taps = theta[0, 0].numel()
    weight = theta.new_empty(draws, rows, taps, channels, dtype=x.dtype)
    low = theta.to(x.dtype).float()
    rademacher = families["rademacher"]
    twins.perturb_weight(low, weight, std, None, tensor, rademacher, first, draws, seed, antithetic, None)
    return weight.float() if scale is None else weight.float() * scale[:, :, None, None]


def _conv_result(
    x: Tensor, outputs: int, draws: int, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], shared: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    height, width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    )
    n = x.shape[0] * (draws if shared else 1)
    return x.new_empty((n, outputs, height, width), dtype=dtype).contiguous(memory_format=torch.channels_last)


def _pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]
