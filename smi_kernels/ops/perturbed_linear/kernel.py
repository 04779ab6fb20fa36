"""Linear layers of K perturbed copies as one launch: K matrix products, with draws as the third axis of the grid.

The weights are given, or (Rademacher noise) drawn inside the tiles from one shared matrix: with few rows of x, reading
K matrices of weights is what a linear layer costs, and drawn weights are read once for all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.epilogues import Epilogue
from smi_kernels.epilogues.triton import finish
from smi_kernels.errors import InputError
from smi_kernels.noise.triton import philox_words
from smi_kernels.ops import launch
from smi_kernels.ops.launch import Signs
from smi_kernels.ops.signs import perturb_by_sign, rounding
from smi_kernels.registry import load_kernel

SIGN_BLOCK = 128
"""Features of a tile whose signs are drawn: one counter's."""

Tile = dict[str, int]

_TILES: dict[str, list[tuple[int, int, Tile]]] = {
    "half": [
        (512, 65, {"block_m": 128, "block_o": 128, "block_k": 64, "num_warps": 8, "num_stages": 3}),
        (33, 33, {"block_m": 64, "block_o": 64, "block_k": 64, "num_warps": 4, "num_stages": 3}),
        (33, 0, {"block_m": 64, "block_o": 16, "block_k": 64, "num_warps": 4, "num_stages": 3}),
        (0, 0, {"block_m": 16, "block_o": 64, "block_k": 64, "num_warps": 4, "num_stages": 3}),
    ],
    "half, signs": [
        (33, 33, {"block_m": 64, "block_o": 64, "num_warps": 4, "num_stages": 3}),
        (33, 0, {"block_m": 64, "block_o": 16, "num_warps": 4, "num_stages": 3}),
        (0, 0, {"block_m": 16, "block_o": 64, "num_warps": 4, "num_stages": 3}),
    ],
    "float32": [
        (33, 33, {"block_m": 64, "block_o": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}),
        (0, 0, {"block_m": 32, "block_o": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}),
    ],
    "float32, signs": [
        (0, 0, {"block_m": 32, "block_o": 32, "num_warps": 8, "num_stages": 2, "weight_first": 1}),
    ],
}
"""Least rows, least outputs, tile; the first that fits is taken. Chosen by registers, spills (none) and instructions of
the compiled code, not by measurement."""


@triton.jit
def _pick(index: tl.tensor, a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    return tl.where(index < 2, tl.where(index == 0, a, b), tl.where(index == 2, c, d))


@triton.jit
def _row_signs(
    key_low: tl.tensor, key_high: tl.tensor, row: tl.tensor, step: tl.tensor, tensor: tl.tensor, number: tl.tensor,
    FEATURES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Four words for each row: the signs of features 128·step to 128·step + 127."""
    start = row * FEATURES + step * 128
    counter = start // 128
    a, b, c, d = philox_words(key_low, key_high, counter, tensor, number, 0)
    if FEATURES % 128 != 0:  # rows begin inside a counter: 128 bits are cut out of two
        e, f, g, h = philox_words(key_low, key_high, counter + 1, tensor, number, 0)
        skip, bit = start % 128 // 32, (start % 32).to(tl.uint32)
        v, w, x = _pick(skip, a, b, c, d), _pick(skip, b, c, d, e), _pick(skip, c, d, e, f)
        y, z = _pick(skip, d, e, f, g), _pick(skip, e, f, g, h)
        a, b, c, d = _cut(v, w, bit), _cut(w, x, bit), _cut(x, y, bit), _cut(y, z, bit)
    # Gathered into one tensor and taken apart by sums, which the compiler does not look through: it would move Philox
    # into the layout of the weights, and every thread would repeat it for all of its rows (1.6 to 2.5 times the code).
    four = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (row.shape[0], 4))
    return _word(four, 0), _word(four, 1), _word(four, 2), _word(four, 3)


@triton.jit
def _word(four: tl.tensor, index: tl.constexpr) -> tl.tensor:
    return tl.sum(tl.where(tl.arange(0, 4)[None, :] == index, four, 0), axis=1)


@triton.jit
def _cut(low: tl.tensor, high: tl.tensor, bit: tl.tensor) -> tl.tensor:
    """32 bits from ``bit`` on of the 64 in (low, high); shifted in two parts, because a shift by 32 is undefined."""
    return (low >> bit) | ((high << 1) << (31 - bit))


@triton.jit(do_not_specialize=["tensor", "first", "key_low", "key_high"])
def linear_kernel(
    x: tl.tensor, weight: tl.tensor, scale: tl.tensor, bias: tl.tensor, residual: tl.tensor, y: tl.tensor,
    std: tl.tensor, tensor: tl.tensor, first: tl.tensor, key_low: tl.tensor, key_high: tl.tensor, x_stride: tl.tensor,
    weight_stride: tl.tensor, rows: tl.tensor, outputs: tl.tensor, FEATURES: tl.constexpr, SIGNS: tl.constexpr,
    ANTITHETIC: tl.constexpr, EPILOGUE: tl.constexpr, ROUND: tl.constexpr, WEIGHT_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """One tile ``[BLOCK_M, BLOCK_O]`` of one draw; its transpose with WEIGHT_FIRST. SIGNS: BLOCK_K is 128."""
    STEPS: tl.constexpr = (FEATURES + BLOCK_K - 1) // BLOCK_K
    draw = tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(rows, BLOCK_M)  # rows vary fastest: neighbours share their weights in L2
    m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = (tl.program_id(0) // tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    # Rows past the end repeat the last one and are not stored: cheaper than a mask.
    lane, row = tl.arange(0, BLOCK_K)[None, :], tl.minimum(o, outputs - 1)
    x += draw * x_stride
    weight += draw * weight_stride
    x_place = tl.minimum(m, rows - 1)[:, None] * FEATURES + lane
    w_place = row[:, None] * FEATURES + lane
    number = first + tl.program_id(2)
    if ANTITHETIC:
        std = tl.where(number % 2 == 1, -std, std)
        number = number // 2

    acc = tl.zeros((BLOCK_O, BLOCK_M) if WEIGHT_FIRST else (BLOCK_M, BLOCK_O), dtype=tl.float32)
    for step in range(STEPS):
        if FEATURES % BLOCK_K == 0:
            x_tile = tl.load(x + (x_place + step * BLOCK_K))
            w_tile = tl.load(weight + (w_place + step * BLOCK_K))
        else:
            valid = step * BLOCK_K + lane < FEATURES
            x_tile = tl.load(x + (x_place + step * BLOCK_K), mask=valid, other=0.0)
            w_tile = tl.load(weight + (w_place + step * BLOCK_K), mask=valid, other=0.0)
        if SIGNS:
            a, b, c, d = _row_signs(key_low, key_high, row, step, tensor, number, FEATURES)
            words = _pick(lane // 32, a[:, None], b[:, None], c[:, None], d[:, None])
            w_tile = perturb_by_sign(w_tile, words, lane % 32, std, ROUND)
        if WEIGHT_FIRST:
            acc = tl.dot(w_tile, tl.trans(x_tile), acc, input_precision="ieee")
        else:
            acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee")

    m, o = (m[None, :], o[:, None]) if WEIGHT_FIRST else (m[:, None], o[None, :])
    finish(acc, scale, bias, residual, y, draw, m, o, rows, outputs, (m < rows) & (o < outputs), EPILOGUE)


def linear_tile(m: int, o: int, f: int, dtype: torch.dtype, signs: bool = False) -> Tile:
    """Tile of the product and how it is launched.

    Args:
        m: rows of one draw.
        o: outputs.
        f: features.
        dtype: of x.
        signs: weights are perturbed in the tile.

    Returns:
        block_m, block_o and block_k: powers of two from 16 on (block_k is 128 with ``signs``); num_warps and
        num_stages. A tile may also have weight_first = 1, to make the weights the first factor.
    """
    kind = "float32" if dtype == torch.float32 else "half"
    table = _TILES[f"{kind}, signs" if signs else kind]
    tile = next(tile for least_m, least_o, tile in table if m >= least_m and o >= least_o)
    return {**tile, "block_k": SIGN_BLOCK if signs else min(tile["block_k"], max(16, launch.next_power_of_two(f)))}


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    draws: int,
    epilogue: Epilogue,
    shared: bool = False,
    out_dtype: torch.dtype | None = None,
    signs: Signs | None = None,
    tile: Mapping[str, int] | None = None,
) -> Tensor:
    """``epilogue(x[j] @ weight[j]ᵀ + bias[j] + residual[j])`` for every draw j, with float32 sums.

    Args:
        x: ``[draws·M, F]``, or ``[M, F]`` with ``shared``; contiguous; float32, bfloat16 or float16.
        weight: ``[draws, O, F]`` of x's dtype, contiguous; with ``signs`` one ``[O, F]`` for all draws.
        bias: float32 ``[draws, O]`` or None.
        residual: ``[draws·M, O]`` of the result's dtype, or None.
        draws: in [1, 65535].
        epilogue: the activation; it must have a Triton twin.
        shared: every draw sees the same x.
        out_dtype: of the result; None: x's.
        signs: noise to add to the weight, drawn inside the tiles; None: the weights have theirs.
        tile: instead of `linear_tile`'s.

    Returns:
        ``[draws·M, O]``.

    Raises:
        InputError: for tensors or numbers other than these.
    """
    rows = _rows(x, weight.shape if signs is not None else weight.shape[1:], draws, shared)
    outputs, features = weight.shape[-2:]
    counter, antithetic, std, scale = (0, 0, 0, 0), False, 0.0, None
    if signs is None:
        launch.check_shape("weight", weight, (draws, outputs, features))
    else:
        which, std, scale = signs.which, signs.std, signs.scale
        counter = (launch.tensor_word(signs.tensor), which.first, *launch.key_words(which.seed))
        antithetic = which.antithetic
    y = torch.empty(draws * rows, outputs, dtype=out_dtype or x.dtype, device=x.device)
    launch.check_layer(x, weight, scale, bias, residual, y, draws)
    if y.numel() == 0:
        return y
    tile = tile or linear_tile(rows, outputs, features, x.dtype, signs is not None)
    tiles = -(-rows // tile["block_m"]) * -(-outputs // tile["block_o"])
    with launch.on_device(x), launch.writable(y) as out:
        linear_kernel[(tiles, 1, draws)](
            launch.readable(x), launch.readable(weight), scale, bias, launch.readable(residual), out,
            std, *counter, 0 if shared else rows * features, 0 if signs is not None else outputs * features, rows,
            outputs, FEATURES=features, SIGNS=signs is not None, ANTITHETIC=antithetic,
            EPILOGUE=load_kernel(epilogue.kernel), ROUND=rounding(x.dtype),
            WEIGHT_FIRST=tile.get("weight_first", 0) == 1,
            BLOCK_M=tile["block_m"], BLOCK_O=tile["block_o"], BLOCK_K=tile["block_k"],
            num_warps=tile["num_warps"], num_stages=tile["num_stages"], enable_fp_fusion=True,
        )  # fmt: skip
    return y


def _rows(x: Tensor, weight: torch.Size, draws: int, shared: bool) -> int:
    """Rows of one draw, if the shapes agree."""
    fits = x.ndim == 2 and len(weight) == 2 and x.shape[1] == weight[1] and 0 not in weight
    if not fits or not 1 <= draws <= 65535 or (not shared and x.shape[0] % draws):
        raise InputError(
            f"x has shape {list(x.shape)}, a draw's weight {list(weight)}, with {draws} draws. Allowed: x [draws·M, F],"
            " or [M, F] with shared=True; weight [O, F]; 1 to 65535 draws."
        )
    rows = x.shape[0] if shared else x.shape[0] // draws
    # The room of 256 is for tiles that reach past the end and for signs, whose counters reach one past.
    if max(rows * weight[1], rows * weight[0], weight.numel()) >= (1 << 31) - 256:
        raise InputError(f"One draw of {rows} rows has 2³¹ or more elements. Allowed: fewer. Use fewer rows.")
    return rows
