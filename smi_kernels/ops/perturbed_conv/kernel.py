"""Convolution of K perturbed copies of a layer as one implicit matrix product per draw and group.

Rows of the product are output pixels, columns are output channels, and the sum runs over (tap, input channel). Patches
are never unfolded: a tile of them is gathered from the image while the product runs. Draws are the third axis of the
grid, so that K small layers fill the device as one large one would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.epilogues import Epilogue
from smi_kernels.epilogues.triton import finish
from smi_kernels.ops import launch
from smi_kernels.ops.launch import Signs
from smi_kernels.ops.perturbed_conv.pack_signs import pack_signs
from smi_kernels.ops.perturbed_conv.shape import ConvShape, Geometry, conv_shape
from smi_kernels.ops.signs import perturb_by_sign, rounding
from smi_kernels.registry import load_kernel
from smi_kernels.tune.choices import HALF, SIGNS, tuned_tile

Tile = dict[str, int]

_TILES: dict[str, list[tuple[int, int, Tile]]] = {
    HALF: [
        (4096, 65, {"block_m": 128, "block_o": 128, "block_k": 64, "num_warps": 8, "num_stages": 3}),
        (4096, 17, {"block_m": 128, "block_o": 64, "block_k": 64, "num_warps": 8, "num_stages": 3}),
        (1024, 17, {"block_m": 64, "block_o": 64, "block_k": 64, "num_warps": 4, "num_stages": 3}),
        (0, 0, {"block_m": 64, "block_o": 32, "block_k": 32, "num_warps": 4, "num_stages": 3}),
    ],
    SIGNS: [  # many pixels to a weight: expanding it takes more instructions than multiplying
        (4096, 17, {"block_m": 256, "block_o": 64, "block_k": 64, "num_warps": 8, "num_stages": 3}),
        (1024, 17, {"block_m": 64, "block_o": 64, "block_k": 64, "num_warps": 4, "num_stages": 3}),
        (0, 0, {"block_m": 64, "block_o": 32, "block_k": 32, "num_warps": 4, "num_stages": 3}),
    ],
    "float32": [
        (1024, 33, {"block_m": 64, "block_o": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}),
        (0, 0, {"block_m": 32, "block_o": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}),
    ],
}
"""Least pixels, least output channels, tile; the first that fits is taken, on a device that `smi_kernels.tune` has not
measured. Chosen by registers, spills (none) and instructions of the compiled code."""


@triton.jit
def _load(
    pointer: tl.tensor, padding: tl.tensor, valid: tl.tensor, PADDED: tl.constexpr, FULL: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Load with as few masks as the shapes allow: each costs registers and instructions."""
    if PADDED and not FULL:
        tile = tl.load(pointer, mask=padding & valid, other=0.0)
    elif PADDED:
        tile = tl.load(pointer, mask=padding, other=0.0)
    elif not FULL:
        tile = tl.load(pointer, mask=valid, other=0.0)
    else:
        tile = tl.load(pointer)
    return tile


@triton.jit
def _sign_words(
    signs: tl.tensor, row: tl.tensor, tap: tl.tensor, channel: tl.tensor, first: tl.tensor, valid: tl.tensor,
    TAPS: tl.constexpr, WORDS: tl.constexpr, MERGED: tl.constexpr, BLOCK_K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The words that hold the signs of (row, tap, channel); channels of a block start at ``first`` unless MERGED."""
    line = signs + (row * TAPS + tap) * WORDS
    if MERGED:
        words = tl.load(line + channel // 32, mask=valid, other=0)
    elif BLOCK_K <= 32:
        words = tl.load(line + first // 32)
    else:  # two words for the whole block: no tile of loads
        words = tl.where(
            channel % 64 < 32, tl.load(line + first // 32), tl.load(line + tl.minimum(first // 32 + 1, WORDS - 1))
        )
    return words


@triton.jit
def _inside(start: tl.tensor, size: tl.tensor, TAPS: tl.constexpr, DILATION: tl.constexpr) -> tl.tensor:
    """Bit t: whether tap t of a patch that begins at ``start`` lies in [0, size), for up to 32 taps."""
    bits = start * 0
    for tap in tl.static_range(TAPS):
        place = start + tap * DILATION
        bits |= ((place >= 0) & (place < size)).to(tl.int32) << tap
    return bits


@triton.jit
def conv_kernel(
    x: tl.tensor, weight: tl.tensor, signs: tl.tensor, scale: tl.tensor, bias: tl.tensor, residual: tl.tensor,
    y: tl.tensor, std: tl.tensor, x_stride: tl.tensor, weight_stride: tl.tensor, pixels: tl.tensor, outputs: tl.tensor,
    height: tl.tensor, width: tl.tensor, out_height: tl.tensor, out_width: tl.tensor, CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, EPILOGUE: tl.constexpr, ROUND: tl.constexpr, MERGED: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """One tile ``[BLOCK_M, BLOCK_O]`` of one draw and group; its transpose with WEIGHT_FIRST.

    MERGED sums over tap · CHANNELS + channel as one axis, so that a few channels do not waste a block each; otherwise
    a block of channels belongs to one tap.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    WORDS: tl.constexpr = (CHANNELS + 31) // 32
    LENGTH: tl.constexpr = TAPS * CHANNELS if MERGED else CHANNELS
    BLOCKS: tl.constexpr = (LENGTH + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = BLOCKS if MERGED else TAPS * BLOCKS
    FULL: tl.constexpr = LENGTH % BLOCK_K == 0
    PADDED: tl.constexpr = PAD_H > 0 or PAD_W > 0

    draw, group, per_group = tl.program_id(2).to(tl.int64), tl.program_id(1), outputs // GROUPS
    tiles = tl.cdiv(per_group, BLOCK_O)  # output channels vary fastest: neighbours share their pixels in L2
    m = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = (tl.program_id(0) % tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    # Rows past the end repeat the last one and are not stored: cheaper than a mask.
    pixel, row = tl.minimum(m, pixels - 1)[:, None], tl.minimum(o, per_group - 1)[:, None] + group * per_group
    place = pixel % (out_height * out_width)
    top, left = (place // out_width) * STRIDE_H - PAD_H, (place % out_width) * STRIDE_W - PAD_W
    position = (pixel // (out_height * out_width) * height + top) * width + left
    # Everything that no step changes is added here: the loop is short of instruction slots before it is of bandwidth.
    lane = tl.arange(0, BLOCK_K)[None, :]
    x += draw * x_stride + group * CHANNELS
    patch, line = position * (GROUPS * CHANNELS), row * (TAPS * CHANNELS)
    if not MERGED:
        patch, line = patch + lane, line + lane
    rows_in = _inside(top, height, KERNEL_H, DILATION_H)
    columns_in = _inside(left, width, KERNEL_W, DILATION_W)
    weight += draw * weight_stride
    if signs is not None:
        signs += draw * outputs * TAPS * WORDS

    acc = tl.zeros((BLOCK_O, BLOCK_M) if WEIGHT_FIRST else (BLOCK_M, BLOCK_O), dtype=tl.float32)
    for step in range(STEPS):
        first = (step % BLOCKS) * BLOCK_K
        valid = first + lane < LENGTH
        if MERGED:
            tap, channel = (first + lane) // CHANNELS, (first + lane) % CHANNELS
            from_patch, from_line = channel, first + lane
        else:
            tap, channel = step // BLOCKS, first + lane
            from_patch, from_line = first, tap * CHANNELS + first
        down, right = tap // KERNEL_W % 32, tap % KERNEL_W  # % 32: masked taps must not shift by more
        from_patch += (down * DILATION_H * width + right * DILATION_W) * (GROUPS * CHANNELS)
        inside = ((rows_in >> down) & (columns_in >> right) & 1) != 0
        x_tile = _load(x + (patch + from_patch), inside, valid, PADDED, FULL)
        w_tile = _load(weight + (line + from_line), valid, valid, False, FULL)
        if signs is not None:
            words = _sign_words(signs, row, tap, channel, first, valid, TAPS, WORDS, MERGED, BLOCK_K)
            w_tile = perturb_by_sign(w_tile, words, channel % 32, std, ROUND)
        if WEIGHT_FIRST:
            acc = tl.dot(w_tile, tl.trans(x_tile), acc, input_precision="ieee")
        else:
            acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")

    m, o = (m[None, :], o[:, None]) if WEIGHT_FIRST else (m[:, None], o[None, :])
    mask = (m < pixels) & (o < per_group)
    finish(acc, scale, bias, residual, y, draw, m, o + group * per_group, pixels, outputs, mask, EPILOGUE)


def conv_tile(m: int, o: int, c: int, dtype: torch.dtype, signs: bool = False) -> Tile:
    """Tile of the product and how it is launched.

    Args:
        m: pixels of one draw.
        o: output channels of a group.
        c: length of the sum that a block may span: input channels of a group, times taps if those are merged.
        dtype: of the images.
        signs: weights are perturbed in the tile.

    Returns:
        block_m, block_o and block_k: powers of two from 16 on, block_k at most 64; num_warps and num_stages. A tile
        may also have weight_first = 1, to make the weights the first factor.
    """
    tile = next(tile for least_m, least_o, tile in _TILES[_kind(dtype, signs)] if m >= least_m and o >= least_o)
    return {**tile, "block_k": min(tile["block_k"], max(16, launch.next_power_of_two(c)))}


@dataclass(frozen=True)
class Packed:
    """Signs of a weight in every draw, and what `Signs` says of them.

    Attributes:
        words: int32 ``[draws, O, KH·KW, ceil(C / groups / 32)]``, as `pack_signs` lays them out.
        std: of the noise.
        scale: float32 ``[draws, O]`` or None.
    """

    words: Tensor
    std: float
    scale: Tensor | None = None


def perturbed_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    draws: int,
    geometry: Geometry,
    epilogue: Epilogue,
    shared: bool = False,
    out_dtype: torch.dtype | None = None,
    packed: Packed | None = None,
    tile: Mapping[str, int] | None = None,
) -> Tensor:
    """``epilogue(conv2d(x[j], weight[j]) + bias[j] + residual[j])`` for every draw j, with float32 sums.

    Args:
        x: ``[draws·N, C, H, W]``, or ``[N, C, H, W]`` with ``shared``; channels_last; float32, bfloat16 or float16.
        weight: ``[draws, O, KH·KW, C / groups]`` of x's dtype, contiguous; with ``packed`` one ``[O, KH·KW, C /
            groups]`` for all draws.
        bias: float32 ``[draws, O]`` or None.
        residual: of the result's shape, dtype and memory format, or None.
        draws: in [1, 65535].
        geometry: kernel, stride, padding, dilation and groups.
        epilogue: the activation; it must have a Triton twin.
        shared: every draw sees the same images.
        out_dtype: of the result; None: x's.
        packed: signs of noise to add to the weight, one bit each, inside the tiles; None: the weights have theirs.
        tile: instead of the tuned one, or of `conv_tile`'s where nothing was tuned.

    Returns:
        ``[draws·N, O, OH, OW]``, channels_last. One draw of x or of the result has fewer than 2³¹ elements.

    Raises:
        InputError: for tensors or numbers other than these.
    """
    shape = conv_shape(x, weight.shape if packed is not None else weight.shape[1:], draws, geometry, shared)
    y = torch.empty(
        (draws * shape.images, shape.outputs, *shape.result),
        dtype=out_dtype or x.dtype, device=x.device, memory_format=torch.channels_last,
    )  # fmt: skip
    words, std, scale = (packed.words, packed.std, packed.scale) if packed is not None else (None, 0.0, None)
    _check_weight(weight, words, shape)
    launch.check_layer(x, weight, scale, bias, residual, y, draws)
    if y.numel() == 0:
        return y
    per_group = shape.outputs // shape.groups
    merged = shape.taps > 1 and shape.channels <= 16
    tile = tile or _tile(x, shape, merged, packed is not None)
    tiles = -(-shape.pixels // tile["block_m"]) * -(-per_group // tile["block_o"])
    with launch.on_device(x), launch.writable(y) as out:
        conv_kernel[(tiles, shape.groups, draws)](
            launch.readable(x), launch.readable(weight), words, scale, bias, launch.readable(residual), out,
            std, 0 if shared else x[: shape.images].numel(), 0 if packed is not None else weight[0].numel(),
            shape.pixels, shape.outputs, *shape.image, *shape.result,
            CHANNELS=shape.channels, GROUPS=shape.groups, KERNEL_H=geometry.kernel[0], KERNEL_W=geometry.kernel[1],
            STRIDE_H=geometry.stride[0], STRIDE_W=geometry.stride[1], PAD_H=geometry.padding[0],
            PAD_W=geometry.padding[1], DILATION_H=geometry.dilation[0], DILATION_W=geometry.dilation[1],
            EPILOGUE=load_kernel(epilogue.kernel), ROUND=rounding(x.dtype), MERGED=merged,
            WEIGHT_FIRST=tile.get("weight_first", 0) == 1,
            BLOCK_M=tile["block_m"], BLOCK_O=tile["block_o"], BLOCK_K=tile["block_k"],
            num_warps=tile["num_warps"], num_stages=tile["num_stages"], enable_fp_fusion=True,
        )  # fmt: skip
    return y


def perturbed_conv_signs(
    x: Tensor,
    theta: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    geometry: Geometry,
    signs: Signs,
    epilogue: Epilogue,
    shared: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`perturbed_conv` with one weight ``[O, C / groups, KH, KW]`` for all draws, and the signs of its noise drawn."""
    rows, channels, *kernel = theta.shape
    words = pack_signs(rows, channels, math.prod(kernel), tensor=signs.tensor, which=signs.which, device=x.device)
    return perturbed_conv(
        x, theta.flatten(2).transpose(1, 2).contiguous(), bias, residual, draws=signs.which.count, geometry=geometry,
        epilogue=epilogue, shared=shared, out_dtype=out_dtype, packed=Packed(words, signs.std, signs.scale),
    )  # fmt: skip


def _tile(x: Tensor, shape: ConvShape, merged: bool, signs: bool) -> Tile:
    tuned = tuned_tile(x.device, shape, _kind(x.dtype, signs))
    length = shape.channels * (shape.taps if merged else 1)
    return tuned or conv_tile(shape.pixels, shape.outputs // shape.groups, length, x.dtype, signs)


def _kind(dtype: torch.dtype, signs: bool) -> str:
    return "float32" if dtype == torch.float32 else SIGNS if signs else HALF


def _check_weight(weight: Tensor, words: Tensor | None, shape: ConvShape) -> None:
    one = (shape.outputs, shape.taps, shape.channels)
    if words is None:
        launch.check_shape("weight", weight, (shape.draws, *one))
        return
    launch.check_shape("theta", weight, one)
    launch.check_shape("signs", words, (shape.draws, *one[:2], -(-shape.channels // 32)))
    launch.check_dtype("signs", words, torch.int32)
    launch.check_tensors(theta=weight, signs=words)
