"""Noise families: what is drawn for an image or a parameter tensor, from logical Philox counters.

The counter of a draw is (block of elements, tensor, draw, stream). It says *what* is drawn and nothing about how: no
batch, chunk, tile or launch index enters, so that every backend draws the same noise, forward and backward.

    word 0   element // elements-per-counter of the family, elements in row-major order
    word 1   tensor: the position of the parameter in ``model.named_parameters()``; 0 for the input
    word 2   draw: k, or k // 2 for antithetic pairs
    word 3   stream: `PARAMETERS` or `INPUT`

The key is the 64-bit seed, low word first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smi_kernels.philox import Words, box_muller, philox, uniform
from smi_kernels.registry import Kernel, Registry

PARAMETERS, INPUT = 0, 1
"""Streams: the last word of the counter."""

_CHUNK = 16384  # counters at a time: the integer temporaries then stay in a core's cache


@dataclass(frozen=True, kw_only=True)
class Family:
    """How random words become noise of mean 0 and variance 1.

    Attributes:
        elements: noise values that one counter (128 bits) gives: 4 or 128.
        values: four int64 tensors ``[B]`` of words in [0, 2³²) to float32 noise ``[B, elements]``. Elementwise: row b
            depends on the words at b alone.
        kernel: the twin of ``values`` in Triton, a ``@triton.jit`` function, or where to find one: "module:name". With
            4 elements it maps four uint32 blocks, the words, to a tuple of four float32 blocks; with 128 it maps a
            uint32 block of words and an int32 block of bit positions in [0, 32) to one float32 block, for element
            32·(word's place) + bit. None: the Triton backend does not support the family.
    """

    elements: int
    values: Callable[[Words], Tensor]
    kernel: Kernel = None


families: Registry[Family] = Registry("noise family")
"""Noise families by name. Add one with ``families.add(name, Family(elements=..., values=...))``."""


def _gaussian(words: Words) -> Tensor:
    first = box_muller(uniform(words[0]), uniform(words[1]))
    second = box_muller(uniform(words[2]), uniform(words[3]))
    return torch.stack([*first, *second], dim=1)


def _rademacher(words: Words) -> Tensor:
    """Bit e % 32 of word e // 32 is the sign of element e: 0 for +1, 1 for −1."""
    shifts = torch.arange(32, device=words[0].device)
    bits = (torch.stack(words, dim=1)[:, :, None] >> shifts) & 1
    return (1 - 2 * bits).flatten(1).to(torch.float32)


families.add("gaussian", Family(elements=4, values=_gaussian, kernel="smi_kernels.triton.noise:gaussian"))
families.add("rademacher", Family(elements=128, values=_rademacher, kernel="smi_kernels.triton.noise:rademacher"))


def draw(
    family: Family,
    shapes: Mapping[int, Sequence[int]],
    *,
    seed: int,
    k: int,
    stream: int,
    antithetic: bool = False,
    device: torch.device | str = "cpu",
) -> dict[int, Tensor]:
    """Draw ``k`` of unit noise for several tensors.

    Args:
        family: the noise family.
        shapes: tensor id in [0, 2³²) to shape. What is drawn for a tensor does not depend on the others.
        seed: in [0, 2⁶⁴).
        k: index of the draw, from 0.
        stream: `PARAMETERS` or `INPUT`.
        antithetic: draws 2j and 2j + 1 are +E and −E.
        device: where to draw. Integers, signs and uniforms are the same everywhere; normals agree to 5e-7.

    Returns:
        Tensor id to float32 noise of the tensor's shape, with mean 0 and variance 1.
    """
    sizes = {tensor: torch.Size(shape).numel() for tensor, shape in shapes.items()}
    blocks = {tensor: -(-size // family.elements) for tensor, size in sizes.items()}
    index = torch.cat([torch.arange(count, device=device) for count in blocks.values()])
    tensor_id = torch.cat([torch.full((count,), tensor, device=device) for tensor, count in blocks.items()])
    number = torch.tensor(k // 2 if antithetic else k, device=device)
    last = torch.tensor(stream, device=device)

    key = (seed & 0xFFFFFFFF, seed >> 32)
    pieces = [
        family.values(philox((i, t, number, last), key))
        for i, t in zip(index.split(_CHUNK), tensor_id.split(_CHUNK), strict=True)
    ]
    values = torch.cat(pieces).flatten()
    if antithetic and k % 2:
        values = -values
    parts = values.split([count * family.elements for count in blocks.values()])
    return {
        tensor: part[: sizes[tensor]].reshape(tuple(shape))
        for (tensor, shape), part in zip(shapes.items(), parts, strict=True)
    }
