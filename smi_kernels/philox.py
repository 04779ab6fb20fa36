"""Philox-4x32: a counter-based random number generator in torch integer operations.

Each 128-bit counter is encrypted under a 64-bit key, so that word ``i`` of a stream can be computed anywhere, in any
order, without state. The words, the uniforms and the recipe of the normals are those of ``tl.philox``, ``tl.rand4x``
and ``tl.randn4x``, so that a Triton kernel can draw the same noise.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

import math

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


def box_muller(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two float32 standard normals from two float32 uniforms in [0, 1), as Triton's ``pair_uniform_to_normal``.

    Source: Box and Muller, "A note on the generation of random normal deviates", 1958. The radius is clipped at 1e-7,
    so no draw exceeds √(−2 ln 1e-7) ≈ 5.68.
    """
    r = torch.sqrt(-2.0 * torch.log(radius.clamp(min=1e-7)))
    theta = (2.0 * math.pi) * angle
    return r * torch.cos(theta), r * torch.sin(theta)
