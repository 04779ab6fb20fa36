"""Convolutions of several draws at once in C; see `conv.c`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from smi_kernels.native.build import library

_SIZES = (
    "draws", "images", "channels", "height", "width", "outputs", "out_height", "out_width", "taps_down", "taps_across",
    "stride_down", "stride_across", "padding_down", "padding_across", "dilation_down", "dilation_across",
    "next_pixel", "next_channel",
)  # fmt: skip
_FLAGS = ("is_bfloat16", "out_bfloat16", "relu", "threads")


class _Convolution(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int64) for name in _SIZES), *((name, ctypes.c_int32) for name in _FLAGS)]


def convolves(dtype: torch.dtype) -> bool:
    """Whether `convolve` can be used for a format, and is fast on this processor."""
    found = library()
    formats = found.convolves() if found is not None and hasattr(found, "convolves") else 0
    return bool(formats & {torch.float32: 1, torch.bfloat16: 2}.get(dtype, 0))


def convolve(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    relu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """act(W x + b + residual) for several draws, each with weights and images of its own.

    Args:
        images: ``[draws·N, C, H, W]``, contiguous or channels_last, on the CPU, in a format that `convolves`.
        weight: ``[draws, O, KH, KW, C]``, contiguous, in the same format.
        bias: float32 ``[draws, O]``, contiguous, or None.
        residual: ``[draws·N, O, H', W']``, channels_last, of ``dtype``; or None.
        stride: as for ``torch.nn.functional.conv2d``.
        padding: likewise.
        dilation: likewise.
        relu: whether act is ReLU; else it is the identity.
        dtype: of the result, one that `convolves`.

    Returns:
        ``[draws·N, O, H', W']``, channels_last.

    Raises:
        MemoryError: if there is none left.
    """
    draws, outputs, *taps, channels = weight.shape
    inner = images.shape[2:]
    outer = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip(inner, padding, dilation, taps, stride, strict=True)
    ]
    out = torch.empty(len(images), outputs, *outer, dtype=dtype, memory_format=torch.channels_last)
    pixels, by_channel = inner.numel(), images.is_contiguous()
    apart = (1, pixels) if by_channel else (channels, 1)
    images_of_draw = len(images) // draws
    sizes = (draws, images_of_draw, channels, *inner, outputs, *outer, *taps, *stride, *padding, *dilation, *apart)
    low = torch.bfloat16
    flags = (int(images.dtype == low), int(dtype == low), int(relu), torch.get_num_threads())
    pointers = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in (out, images, weight, bias, residual)]
    if not library().convolve(*pointers, _Convolution(*sizes, *flags)):  # type: ignore[union-attr]
        raise MemoryError("No memory for the weights of a convolution.")
    return out
