"""Sizes of a convolution of K copies, checked before anything is launched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from smi_kernels.errors import InputError

Pair = int | Sequence[int]


@dataclass(frozen=True)
class Geometry:
    """How a convolution reads its images; see `geometry`."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def result(self, image: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the result for images of so many."""
        rows, columns = (
            (size + 2 * z - d * (k - 1) - 1) // s + 1
            for size, z, d, k, s in zip(image, self.padding, self.dilation, self.kernel, self.stride, strict=True)
        )
        return rows, columns

    @property
    def of_conv2d(self) -> tuple[Any, ...]:
        """What ``torch.nn.functional.conv2d`` takes after the bias."""
        return astuple(self)[1:]


def geometry(kernel_size: Pair, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1) -> Geometry:
    """The geometry of a convolution.

    Args:
        kernel_size: (KH, KW), or one number for both; so are the next three.
        stride: from 1.
        padding: zeros on each side, from 0.
        dilation: from 1.
        groups: divides the channels in and out; at most 65535.

    Raises:
        InputError: for numbers out of range.
    """
    return Geometry(
        _pair("kernel_size", kernel_size, 1), _pair("stride", stride, 1), _pair("padding", padding, 0),
        _pair("dilation", dilation, 1), groups,
    )  # fmt: skip


def _pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise InputError(f"{name} is {value!r}. Allowed: one or two integers from {least} on.")
    return pair[0], pair[1]


@dataclass(frozen=True)
class ConvShape:
    """Sizes of a convolution: images and pixels per draw, channels per group, outputs in all."""

    draws: int
    images: int
    channels: int
    outputs: int
    image: tuple[int, int]
    result: tuple[int, int]
    geometry: Geometry
    shared: bool

    @property
    def groups(self) -> int:
        """Groups of channels."""
        return self.geometry.groups

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.geometry.kernel[0] * self.geometry.kernel[1]

    @property
    def pixels(self) -> int:
        """Of the result of one draw."""
        return self.images * self.result[0] * self.result[1]


def conv_shape(x: Tensor, weight: torch.Size, draws: int, geometry: Geometry, shared: bool) -> ConvShape:
    """The sizes, from x and the shape ``[O, KH·KW, C / groups]`` of one draw's weight.

    Raises:
        InputError: for sizes that do not fit together, or that pass what the kernel's int32 offsets reach.
    """
    if x.ndim != 4 or len(weight) != 3 or not 1 <= draws <= 65535 or (not shared and x.shape[0] % draws):
        raise InputError(
            f"x has shape {list(x.shape)}, a draw's weight {list(weight)}, with {draws} draws. Allowed: x "
            "[draws·N, C, H, W], or [N, C, H, W] with shared=True; weight [O, KH·KW, C / groups]; 1 to 65535 draws."
        )
    channels, outputs, groups = x.shape[1], weight[0], geometry.groups
    if not 1 <= groups <= 65535 or channels % groups or outputs % groups or not channels or not outputs:
        raise InputError(f"{groups} groups for {channels} channels in, {outputs} out. Allowed: a divisor of both.")
    if max(geometry.kernel) > 32:  # the kernel keeps one bit per row and per column of taps in an int32
        raise InputError(f"kernel_size is {geometry.kernel!r}. Allowed: at most 32 by 32.")
    image = (x.shape[2], x.shape[3])
    result = geometry.result(image)
    if min(result) < 1:
        raise InputError(
            f"A kernel of {geometry.kernel} with dilation {geometry.dilation} exceeds images of {image} with padding "
            f"{geometry.padding}. Allowed: kernels that fit once."
        )
    images = x.shape[0] if shared else x.shape[0] // draws
    sizes = (images * channels * math.prod(image), images * outputs * math.prod(result), weight.numel())
    if max(sizes) >= 1 << 31:
        raise InputError(f"One draw of {images} images has 2³¹ or more elements. Allowed: fewer. Use fewer images.")
    return ConvShape(draws, images, channels // groups, outputs, image, result, geometry, shared)
