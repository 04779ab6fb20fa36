"""Philox-4x32: a counter-based random number generator in torch integer operations.

Each 128-bit counter is encrypted under a 64-bit key, so that word ``i`` of a stream can be computed anywhere, in any
order, without state. The words and the uniforms are those of ``tl.philox`` and ``tl.rand4x``; the normals are built of
operations that are correctly rounded everywhere, so that every backend draws the same bits.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smi_kernels.errors import InputError

Words = tuple[Tensor, Tensor, Tensor, Tensor]
"""Four int64 tensors that broadcast together, each holding 32-bit words: values in [0, 2³²)."""

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_UNIT = 4.6566127342e-10  # just under 2⁻³¹, so that the largest word maps below 1


def philox(counter: Words, key: tuple[int, int], rounds: int = 10) -> Words:
    """Encrypt counters: 128 random bits for each.

    Args:
        counter: four int64 tensors of words in [0, 2³²), least significant first; they may broadcast.
        key: two words in [0, 2³²), least significant first.
        rounds: 10, or 7, the fewest that pass BigCrush.

    Returns:
        Four int64 tensors of words in [0, 2³²), of the counters' common shape.

    Raises:
        InputError: for another number of rounds.
    """
    if rounds not in (7, 10):
        raise InputError(
            f"Philox with {rounds!r} rounds is not offered. Allowed: 10, or 7, the fewest of good quality."
        )
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high_a, low_a = _multiply(c0, _MULTIPLIERS[0])
        high_b, low_b = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 × 32 bit product, without overflow in int64.

    The product may need 64 bits. Both multipliers lie above 3·2³⁰, so ``word · (multiplier − 2³²)`` needs at most 62
    and a sign, and the ``word · 2³²`` left out adds exactly ``word`` to the high half.
    """
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & _LOW


def uniform(word: Tensor) -> Tensor:
    """Words in [0, 2³²) to float32 uniforms in [0, 1), bit for bit as Triton's ``uint_to_uniform_float``.

    The word is read as a signed integer s and s < 0 is mapped to ~s, which leaves 31 bits.
    """
    folded = torch.minimum(word, _LOW - word)
    return folded.to(torch.float32) * _UNIT


# Polynomials for `box_muller`, near minimax in float32: P with log(1 + x) = x − x²/2 + x³ P(x) on [√½ − 1, √2 − 1],
# and S, C with sin(πr/2) = r S(r²), cos(πr/2) = 1 + r² C(r²) on |r| ≤ ½. Ascending powers.
LOG = (0.33333316, -0.2500081, 0.20002286, -0.16624554, 0.1418119, -0.13128755, 0.12881647, -0.078596115)
SIN = (1.5707964, -0.6459635, 0.079680227, -0.0046021771)
COS = (-1.2337005, 0.25366923, -0.020860288, 0.00090402167)
LN2 = (0.693359375, -2.1219444e-4)
"""log 2 in two parts; the first has so few bits that its product with an exponent is exact."""


def box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 standard normals from two float32 uniforms in [0, 1): √(−2 ln r) (cos 2πa, sin 2πa).

    Built of additions, products and one square root, each correctly rounded and none fused, so that every backend
    gives the same bits; libraries' logarithms, sines and cosines differ in the last ones. The error is below 7e-7
    (four million words were tried), one or two units in the last place of the largest values.

    Source: Box and Muller, "A note on the generation of random normal deviates", 1958. The radius is clipped at 1e-7,
    so no draw exceeds √(−2 ln 1e-7) ≈ 5.68.
    """
    # By way of float64, because torch's own float32 root is not correctly rounded where it comes from MKL.
    r = (-2.0 * _log(radius.clamp(min=1e-7))).double().sqrt().float()
    turns = 4.0 * angle
    quarter = torch.floor(turns + 0.5)
    rest = turns - quarter  # exact, in [−½, ½]
    square = rest * rest
    sine, cosine = rest * _polynomial(SIN, square), 1.0 + square * _polynomial(COS, square)
    quarter = quarter.to(torch.int32)
    swap = (quarter & 1) == 1
    across, up = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    across = torch.where(((quarter + 1) & 2) == 2, -across, across)
    up = torch.where((quarter & 2) == 2, -up, up)
    return r * across, r * up


def _log(value: Tensor) -> Tensor:
    """Natural logarithm of normal positive float32: the exponent is split off, the rest is in [√½, √2)."""
    bits = value.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    x = (bits - (exponent << 23)).view(torch.float32) - 1.0
    exponent = exponent.to(torch.float32)
    square = x * x
    small = (x * square) * _polynomial(LOG, x) + exponent * LN2[1] - 0.5 * square
    return small + x + exponent * LN2[0]


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = coefficients[-1] * x
    for c in coefficients[-2:0:-1]:
        total = (total + c) * x
    return total + coefficients[0]
