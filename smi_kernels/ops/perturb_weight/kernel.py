"""Perturbed weights of one layer for a chunk of draws, cast and laid out for a matrix product, in one kernel."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.errors import InputError
from smi_kernels.noise import FLIPOUT, INDEPENDENT, PARAMETERS, RANK1, Family
from smi_kernels.noise.triton import counter_noise
from smi_kernels.ops import launch
from smi_kernels.ops.launch import Draws

_STRUCTURES = {INDEPENDENT: 0, RANK1: 1, FLIPOUT: 2}
"""The kernel's constants for how the noise of a weight is built."""


def perturb_weight(
    theta: Tensor,
    out: Tensor,
    *,
    std: float,
    scale: Tensor | None = None,
    tensor: int,
    family: Family,
    which: Draws,
    factors: tuple[Tensor, Tensor] | None = None,
    block: int | None = None,
    num_warps: int | None = None,
) -> None:
    """Write (θ + std·noise_j)·scale_j for several draws j into ``out``.

    The noise of draw j on element (r, c, t) of θ seen as ``[rows, channels, taps]`` is, by the family's
    structure:

    - ``independent``: the family's, at element (r·channels + c)·taps + t, as in `smi_kernels.noise.draw`;
    - ``rank1``: a[j, r]·b[j, c·taps + t] with factors (a ``[draws, rows]``, b ``[draws, channels·taps]``);
    - ``flipout``: base·s_out[j, r]·s_in[j, c] with factors (s_out ``[draws, rows]``, s_in ``[draws, channels]``),
      where base is the family's draw 0 for all j.

    Factors are float32 and already hold the antithetic sign: `smi_kernels.noise.factors` of each draw. Rounding is
    torch's of ``(theta + std * noise) * scale`` in float32, bit for bit, and then one cast.

    Args:
        theta: the weight, float32 ``[rows, channels, *]``; further dimensions are the taps, ``[rows, channels]`` has 1.
        out: ``[draws, rows, taps, channels]`` in bfloat16, float16 or float32; overwritten.
        std: standard deviation of the noise, ≥ 0.
        scale: float32 ``[draws, rows]``, or None for 1.
        tensor: the weight's id in [0, 2³²), word 1 of the counters.
        family: the noise family; it must have a Triton twin (unused by ``rank1``).
        which: the draws; whether they are antithetic counts for ``independent`` alone.
        factors: see above; None for ``independent``.
        block: elements in one program, a power of two from 512; None: 1024, or 4096 for a family of 128 elements per
            counter, which is drawn once for a thread's elements. Changes no bit.
        num_warps: of one program; None: 4, or 8 for blocks of 4096 or more. Changes no bit.

    Raises:
        InputError: for tensors, an id or a family that cannot be used.
    """
    rows, channels, taps = _sizes(theta)
    structure = family.structure
    _check(theta, out, scale, factors, structure, (which.count, rows, taps, channels))
    elements, twin = (4, None) if structure == RANK1 else (family.elements, launch.family_kernel(family))
    programs, first_number, signs = (which if structure == INDEPENDENT else replace(which, antithetic=False)).grid()
    block = block or (1024 if elements == 4 else 4096)
    pairs = _pairs(block, taps, elements)
    left, right = factors or (None, None)
    with launch.on_device(theta), launch.writable(out) as target:
        _perturb_weight[(triton.cdiv(rows * channels, pairs), programs)](
            theta, target, scale, left, right, rows, float(std), which.first, first_number, which.count,
            *launch.key_words(which.seed), launch.tensor_word(tensor), FAMILY=twin, ELEMENTS=elements,
            STRUCTURE=_STRUCTURES[structure], SIGNS=signs, STREAM=PARAMETERS, CHANNELS=channels,
            TAPS=taps, PAIRS=pairs, BLOCK=_block(pairs, taps, elements),
            num_warps=num_warps or (4 if block < 4096 else 8), enable_fp_fusion=False,
        )  # fmt: skip


def _sizes(theta: Tensor) -> tuple[int, int, int]:
    """Rows, channels and taps of a weight."""
    if theta.ndim < 2 or not theta.numel():
        raise InputError(f"theta has shape {list(theta.shape)}. Allowed: [rows, channels, *], not empty.")
    rows, channels = theta.shape[:2]
    if rows * channels >= 1 << 31:
        raise InputError(f"theta has {rows} rows of {channels} channels. Allowed: a product below 2³¹.")
    return rows, channels, theta.shape[2:].numel()


def _check(
    theta: Tensor, out: Tensor, scale: Tensor | None, factors: tuple[Tensor, Tensor] | None, structure: str,
    shape: tuple[int, int, int, int],
) -> None:  # fmt: skip
    if (factors is None) != (structure == INDEPENDENT):
        raise InputError(f"factors do not fit structure {structure!r}. Allowed: two tensors, or None for independent.")
    left, right = factors or (None, None)
    launch.check_tensors(theta=theta, out=out, scale=scale, left_factor=left, right_factor=right)
    draws, rows, taps, channels = shape
    launch.check_shape("out", out, shape)
    launch.check_shape("scale", scale, (draws, rows))
    launch.check_shape("left_factor", left, (draws, rows))
    launch.check_shape("right_factor", right, (draws, channels * (taps if structure == RANK1 else 1)))
    launch.check_dtype("out", out, *launch.LOW_PRECISION, torch.float32)
    for name, tensor in {"theta": theta, "scale": scale, "left_factor": left, "right_factor": right}.items():
        launch.check_dtype(name, tensor, torch.float32)


def _pairs(block: int, taps: int, elements: int) -> int:
    """(row, channel) pairs in one program: a multiple of 16, for wide stores, as far as they fit the block.

    Programs start at an element that is a multiple of 4. A counter of 128 elements may begin up to 124 before.
    """
    if taps == 1:
        return block
    before = elements - 4
    step = 16 if block - before >= 16 * taps else 4
    return max(step, (block - before) // taps // step * step)


def _block(pairs: int, taps: int, elements: int) -> int:
    """Elements that one program computes; a power of two that holds its own and those of a counter begun before."""
    return launch.next_power_of_two(pairs * taps + (0 if taps == 1 else elements - 4))


@triton.jit(do_not_specialize=["first", "first_number", "draws", "key_low", "key_high", "tensor"])
def _perturb_weight(
    theta: tl.tensor, out: tl.tensor, scale: tl.tensor, left: tl.tensor, right: tl.tensor, rows: tl.tensor,
    std: tl.tensor, first: tl.tensor, first_number: tl.tensor, draws: tl.tensor, key_low: tl.tensor,
    key_high: tl.tensor, tensor: tl.tensor, FAMILY: tl.constexpr, ELEMENTS: tl.constexpr, STRUCTURE: tl.constexpr,
    SIGNS: tl.constexpr, STREAM: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    pair0 = tl.program_id(0) * PAIRS
    number = first_number + tl.program_id(1)
    # Elements in θ's order, from the start of a counter on, which may lie before the program's first pair.
    start = pair0.to(tl.int64) * TAPS
    shift = 0
    if PAIRS * TAPS % ELEMENTS != 0:
        shift = (start % ELEMENTS).to(tl.int32)
        start -= shift
    local = tl.arange(0, BLOCK)
    mine = local - shift
    inside = (mine >= 0) & (mine < tl.minimum(rows * CHANNELS - pair0, PAIRS) * TAPS)
    weight = tl.load(theta + start + local, inside, other=0.0)
    noise = tl.zeros([BLOCK], tl.float32)
    if STRUCTURE != 1:
        index = (start // ELEMENTS).to(tl.uint32) + tl.arange(0, BLOCK // ELEMENTS)[None, :]
        drawn = number if STRUCTURE == 0 else 0
        noise = counter_noise(FAMILY, ELEMENTS, key_low, key_high, index, tensor, drawn, STREAM).reshape(BLOCK)

    # Elements in the order of `out`, tap by tap, and where they are in θ's order.
    tap = local // PAIRS
    to_pair = pair0 + local % PAIRS
    stored = (tap < TAPS) & (to_pair < rows * CHANNELS)
    row = to_pair // CHANNELS
    place = (row.to(tl.int64) * TAPS + tap) * CHANNELS + to_pair % CHANNELS
    # Eight neighbours have one tap and one row, and are stored at once; the compiler cannot see it for all PAIRS.
    if CHANNELS % 8 == 0 and PAIRS % 8 == 0:
        place = tl.max_contiguous(tl.multiple_of(place, 8), 8)
        stored = tl.max_constancy(stored, 8)
    source = tl.where(stored, shift + local % PAIRS * TAPS + tap, 0)
    for s in tl.static_range(SIGNS):
        draw = number * SIGNS + s - first
        if (draw >= 0) & (draw < draws):
            signed = noise if s == 0 else -1.0 * noise
            if STRUCTURE != 0:
                signed = _structured(left, right, noise, draw, pair0, mine, rows, inside, STRUCTURE, CHANNELS, TAPS)
            value = weight + std * signed
            if TAPS > 1:
                value = tl.gather(value, source, 0)
            if scale is not None:
                value *= tl.load(scale + draw * rows + row, stored, other=0.0)
            size = tl.cast(rows, tl.int64) * (CHANNELS * TAPS)
            tl.store(out + draw * size + place, value.to(out.dtype.element_ty), stored)


@triton.jit
def _structured(
    left: tl.tensor, right: tl.tensor, base: tl.tensor, draw: tl.tensor, pair0: tl.tensor, mine: tl.tensor,
    rows: tl.tensor, inside: tl.tensor, STRUCTURE: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Noise of structure 1 (rank1) or 2 (flipout) of a draw at elements ``mine`` after the pair ``pair0``."""
    pair, tap = pair0 + mine // TAPS, mine % TAPS
    row, channel = pair // CHANNELS, pair % CHANNELS
    by_row = tl.load(left + draw.to(tl.int64) * rows + row, inside, other=0.0)
    if STRUCTURE == 1:
        column = draw.to(tl.int64) * (CHANNELS * TAPS) + channel * TAPS + tap
        return by_row * tl.load(right + column, inside, other=0.0)
    return base * by_row * tl.load(right + draw.to(tl.int64) * CHANNELS + channel, inside, other=0.0)
