"""Noise in Triton, for use inside kernels: the twin of `philox.py` and of the values of the families, bit for bit.

Normals are built of additions, products and one square root, in the order of `smi_kernels.noise.philox.box_muller`. A
kernel that draws them must be launched with ``enable_fp_fusion=False``: a fused multiply-add rounds differently.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_words(
    key_low: tl.tensor, key_high: tl.tensor, c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Philox-4x32 with 10 rounds, equal to `smi_kernels.noise.philox.philox`.

    Args:
        key_low: low word of the seed: an integer scalar whose low 32 bits count; so are all arguments.
        key_high: high word of the seed.
        c0: block of elements: a scalar or a block.
        c1: tensor id.
        c2: draw.
        c3: stream.

    Returns:
        Four uint32 blocks of the counters' common shape.
    """
    high = tl.cast(key_high, tl.uint32).to(tl.uint64)
    low = tl.cast(key_low, tl.uint32).to(tl.uint64)
    return tl.philox(
        (high << 32) | low,
        tl.cast(c0, tl.uint32),
        tl.cast(c1, tl.uint32),
        tl.cast(c2, tl.uint32),
        tl.cast(c3, tl.uint32),
    )


@triton.jit
def uniform(word: tl.tensor) -> tl.tensor:
    """Uint32 words to float32 uniforms in [0, 1): read as signed s, s < 0 mapped to ~s, scaled by just under 2⁻³¹."""
    signed = word.to(tl.int32, bitcast=True)
    return tl.where(signed < 0, ~signed, signed).to(tl.float32) * 4.6566127342e-10


@triton.jit
def gaussian(
    w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Four uint32 blocks of words to four float32 blocks of standard normals: elements 0 to 3 of each counter."""
    v0, v1 = _box_muller(uniform(w0), uniform(w1))
    v2, v3 = _box_muller(uniform(w2), uniform(w3))
    return v0, v1, v2, v3


@triton.jit
def rademacher(word: tl.tensor, bit: tl.tensor) -> tl.tensor:
    """Uint32 words and int32 bit positions in [0, 32), which broadcast, to float32 signs: bit 0 is +1, bit 1 is −1."""
    return (1 - 2 * ((word >> bit.to(tl.uint32)) & 1).to(tl.int32)).to(tl.float32)


@triton.jit
def _box_muller(radius: tl.tensor, angle: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    r = tl.sqrt_rn(-2.0 * _log(tl.maximum(radius, 1e-7)))
    turns = 4.0 * angle
    quarter = (turns + 0.5).to(tl.int32)  # floor: turns is not negative
    rest = turns - quarter.to(tl.float32)
    square = rest * rest
    # smi_kernels.noise.philox.SIN and COS by Horner's rule.
    s = ((-0.0046021771 * square + 0.079680227) * square + -0.6459635) * square + 1.5707964
    c = ((0.00090402167 * square + -0.020860288) * square + 0.25366923) * square + -1.2337005
    sine, cosine = rest * s, 1.0 + square * c
    swap = (quarter & 1) == 1
    across, up = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    return _with_sign(r * across, (quarter + 1) & 2), _with_sign(r * up, quarter & 2)


@triton.jit
def _with_sign(value: tl.tensor, two: tl.tensor) -> tl.tensor:
    """Float32 value, negated where ``two`` is 2 rather than 0; on the bits, because −x is 0 − x in Triton."""
    return (value.to(tl.int32, bitcast=True) ^ (two << 30)).to(tl.float32, bitcast=True)


@triton.jit
def _log(value: tl.tensor) -> tl.tensor:
    bits = value.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    x = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    square = x * x
    # smi_kernels.noise.philox.LOG by Horner's rule.
    p = (-0.078596115 * x + 0.12881647) * x
    p = (p + -0.13128755) * x
    p = (p + 0.1418119) * x
    p = (p + -0.16624554) * x
    p = (p + 0.20002286) * x
    p = (p + -0.2500081) * x
    p = p + 0.33333316
    small = (x * square) * p + e * -2.1219444e-4 - 0.5 * square
    return small + x + e * 0.693359375


@triton.jit
def counter_noise(
    family: tl.constexpr, elements: tl.constexpr, key_low: tl.tensor, key_high: tl.tensor, index: tl.tensor,
    tensor: tl.tensor, draw: tl.tensor, stream: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Unit noise of a family for a block of counters, laid out in the order of the elements.

    Args:
        family: the family's Triton twin (`smi_kernels.noise.Family.kernel`).
        elements: per counter: 4 or 128.
        key_low: low word of the seed; see `philox_words` for it and the counter.
        key_high: high word of the seed.
        index: blocks of elements ``[R, B]``: word 0 of the counters.
        tensor: word 1: a scalar, or ``[R, B]``.
        draw: word 2: a scalar.
        stream: word 3: a scalar.

    Returns:
        Float32 ``[R, B · elements]``: row r holds the elements of its B counters one after the other.
    """
    w0, w1, w2, w3 = philox_words(key_low, key_high, index, tensor, draw, stream)
    rows: tl.constexpr = index.shape[0]
    columns: tl.constexpr = index.shape[1]
    if elements == 4:
        v0, v1, v2, v3 = family(w0, w1, w2, w3)
        values = tl.join(tl.join(v0, v2), tl.join(v1, v3))  # [R, B, i, j] is value 2i + j
    else:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(rows, columns * 4, 1)
        values = family(words, tl.arange(0, 32)[None, None, :])
    return values.reshape(rows, columns * elements)
