"""Sizes of a convolution of K copies, checked before anything is launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smi_kernels.errors import InputError

Pair = int | tuple[int, int]


@dataclass(frozen=True)
class ConvShape:
    """Sizes of a convolution: images and pixels per draw, channels per group, outputs in all."""

    draws: int
    images: int
    channels: int
    outputs: int
    image: tuple[int, int]
    result: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    shared: bool

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def pixels(self) -> int:
        """Of the result of one draw."""
        return self.images * self.result[0] * self.result[1]


def _pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise InputError(f"{name} is {value!r}. Allowed: one or two integers from {least} on.")
    return pair[0], pair[1]


def conv_shape(
    x: Tensor, weight: torch.Size, draws: int, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair,
    groups: int, shared: bool,
) -> ConvShape:  # fmt: skip
    """The sizes, from x and the shape ``[O, KH·KW, C / groups]`` of one draw's weight.

    Raises:
        InputError: for sizes that do not fit together, or that pass what the kernel's int32 offsets reach.
    """
    if x.ndim != 4 or len(weight) != 3 or not 1 <= draws <= 65535 or (not shared and x.shape[0] % draws):
        raise InputError(
            f"x has shape {list(x.shape)}, a draw's weight {list(weight)}, with {draws} draws. Allowed: x "
            "[draws·N, C, H, W], or [N, C, H, W] with shared=True; weight [O, KH·KW, C / groups]; 1 to 65535 draws."
        )
    channels, outputs = x.shape[1], weight[0]
    if not 1 <= groups <= 65535 or channels % groups or outputs % groups or not channels or not outputs:
        raise InputError(f"{groups} groups for {channels} channels in, {outputs} out. Allowed: a divisor of both.")
    kernel, steps = _pair("kernel_size", kernel_size, 1), _pair("stride", stride, 1)
    if max(kernel) > 32:  # the kernel keeps one bit per row and per column of taps in an int32
        raise InputError(f"kernel_size is {kernel_size!r}. Allowed: at most 32 by 32.")
    zeros, spread = _pair("padding", padding, 0), _pair("dilation", dilation, 1)
    height, width = (
        (size + 2 * z - d * (k - 1) - 1) // s + 1
        for size, z, d, k, s in zip(x.shape[2:], zeros, spread, kernel, steps, strict=True)
    )
    if height < 1 or width < 1:
        raise InputError(
            f"A kernel of {kernel} with dilation {spread} exceeds images of {tuple(x.shape[2:])} with padding {zeros}. "
            "Allowed: kernels that fit once."
        )
    images = x.shape[0] if shared else x.shape[0] // draws
    if max(images * channels * x.shape[2:].numel(), images * outputs * height * width, weight.numel()) >= 1 << 31:
        raise InputError(f"One draw of {images} images has 2³¹ or more elements. Allowed: fewer. Use fewer images.")
    return ConvShape(
        draws, images, channels // groups, outputs, (x.shape[2], x.shape[3]), (height, width),
        kernel, steps, zeros, spread, groups, shared,
    )  # fmt: skip
