"""Rademacher signs of convolution weights, one bit each, in the order in which the convolution reads them.

A counter gives the signs of 128 consecutive elements of a parameter ``[O, C, KH, KW]``, where the taps of one channel
are neighbours. The convolution reads the channels of one tap, whose signs lie KH·KW bits apart. Drawing them in its
tiles would take a Philox call for every few weights, in every tile of pixels; so they are drawn once, at a sixteenth of
the memory that bfloat16 weights take, and reordered here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.errors import InputError
from smi_kernels.noise.triton import philox_words
from smi_kernels.ops.launch import Draws, check_tensors, key_words, on_device, tensor_word


@triton.jit(do_not_specialize=["tensor", "first", "key_low", "key_high"])
def draw_words_kernel(
    words: tl.tensor, counters: tl.tensor, tensor: tl.tensor, first: tl.tensor, key_low: tl.tensor,
    key_high: tl.tensor, ANTITHETIC: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Four words for each counter of one draw, ``[draws, counters, 4]``: a tile of ``BLOCK`` counters."""
    draw = tl.program_id(1)
    number = first + draw
    if ANTITHETIC:
        number = number // 2
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = philox_words(key_low, key_high, index, tensor, number, 0)
    pair = tl.join(tl.join(a, c), tl.join(b, d))  # [BLOCK, 2, 2], then in the order a, b, c, d
    four = tl.reshape(pair, (BLOCK * 4,)).to(tl.int32, bitcast=True)
    if ANTITHETIC:
        four = four ^ (0 - (first + draw) % 2)
    place = tl.program_id(0) * BLOCK * 4 + tl.arange(0, BLOCK * 4)
    tl.store(words + draw.to(tl.int64) * counters * 4 + place, four, mask=place < counters * 4)


@triton.jit
def reorder_kernel(
    words: tl.tensor, signs: tl.tensor, size: tl.tensor, counters: tl.tensor, CHANNELS: tl.constexpr,
    TAPS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Gather the bits of ``BLOCK`` words of ``signs[draw]``: bit i of word w at (row, tap) is channel 32·w + i's."""
    draw = tl.program_id(1).to(tl.int64)
    WIDTH: tl.constexpr = (CHANNELS + 31) // 32
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, tap = (place // (TAPS * WIDTH))[:, None], (place // WIDTH % TAPS)[:, None]
    lane = tl.arange(0, 32)[None, :]
    channel = (place % WIDTH * 32)[:, None] + lane
    element = (row * CHANNELS + channel) * TAPS + tap
    valid = (channel < CHANNELS) & (place < size)[:, None]
    source = tl.load(words + draw * counters * 4 + element // 32, mask=valid, other=0)
    bits = ((source >> (element % 32)) & 1) << lane  # no two in the same place: their sum is their union
    tl.store(signs + draw * size + place, tl.sum(bits, axis=1), mask=place < size)


def pack_signs(rows: int, channels: int, taps: int, *, tensor: int, which: Draws, device: torch.device | str) -> Tensor:
    """Signs of the parameter ``[rows, channels, *kernel]`` in several draws.

    Args:
        rows: output channels.
        channels: input channels of a group.
        taps: kernel positions. rows · channels · taps < 2³¹.
        tensor: id of the parameter in [0, 2³²).
        which: the draws.
        device: a CUDA device, or the CPU in Triton's interpreter.

    Returns:
        int32 ``[draws, rows, taps, ceil(channels / 32)]``: bit c % 32 of word c // 32 is channel c's sign, 0 for +1.
        Bits past the last channel are 0.

    Raises:
        InputError: for numbers out of range, or another device.
    """
    elements, draws = rows * channels * taps, which.count
    if min(rows, channels, taps) < 1 or elements >= 1 << 31:
        raise InputError(
            f"No signs for {rows} × {channels} × {taps} weights. Allowed: sizes from 1 with fewer than 2³¹ weights."
        )
    counters, size = -(-elements // 128), rows * taps * -(-channels // 32)
    words = torch.empty(draws, counters, 4, dtype=torch.int32, device=device)
    signs = torch.empty(draws, rows, taps, size // (rows * taps), dtype=torch.int32, device=device)
    check_tensors(signs=signs)
    with on_device(signs):
        draw_words_kernel[(-(-counters // 128), draws)](
            words, counters, tensor_word(tensor), which.first, *key_words(which.seed), ANTITHETIC=which.antithetic,
            BLOCK=128, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        reorder_kernel[(-(-size // 32), draws)](
            words, signs, size, counters, CHANNELS=channels, TAPS=taps, BLOCK=32, num_warps=4, enable_fp_fusion=False
        )
    return signs
