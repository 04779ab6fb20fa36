"""Noise families: what is drawn for an image or a parameter tensor, from logical Philox counters.

The counter of a draw is (block of elements, tensor, draw, stream). It says *what* is drawn and nothing about how: no
batch, chunk, tile or launch index enters, so that every backend draws the same noise, forward and backward.

    word 0   element // elements-per-counter of the family, elements in row-major order
    word 1   tensor: the position of the parameter in ``model.named_parameters()``; 0 for the input
    word 2   draw: k, or k // 2 for antithetic pairs
    word 3   stream: `PARAMETERS` or `INPUT`, and `SIGNS` more for the signs of a flipout family

The key is the 64-bit seed, low word first.

A family whose elements are independent draws one value for each. The others are built of fewer values, which lets one
matrix product with the unperturbed weights serve all draws. With rows i (the first dimension of a tensor) and columns
j (all others, flattened), c the index in the second dimension:

    rank1     E[i, j] = a[i] b[j]                 a drawn as elements 0 .. rows, b as those from the next counter on
    flipout   E[i, j] = B[i, j] s_out[i] s_in[c]  B shared by all draws (draw 0), signs drawn for each

A tensor of one dimension has rows only: rank1 gives a, flipout B s_out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smi_kernels import native
from smi_kernels.errors import InputError
from smi_kernels.noise.philox import Words, box_muller, philox, uniform
from smi_kernels.precision import has_float64
from smi_kernels.registry import Kernel, Registry

PARAMETERS, INPUT, SIGNS = 0, 1, 2
"""Streams: the last word of the counter."""

INDEPENDENT, RANK1, FLIPOUT = "independent", "rank1", "flipout"
STRUCTURES = (INDEPENDENT, RANK1, FLIPOUT)
"""How a family's noise is built of random values."""

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
        structure: ``independent`` elements, or built of fewer values: ``rank1`` or ``flipout``.
        native: the twin of ``values`` in `smi_kernels.native`, by name, or None.

    Raises:
        InputError: for another number of elements, or an unknown structure.
    """

    elements: int
    values: Callable[[Words], Tensor]
    kernel: Kernel = None
    structure: str = INDEPENDENT
    native: str | None = None

    def __post_init__(self) -> None:
        if self.elements not in (4, 128):
            raise InputError(f"elements is {self.elements!r}. Allowed: 4, one for each word, or 128, one for each bit.")
        if self.structure not in STRUCTURES:
            raise InputError(f"structure is {self.structure!r}. Allowed: {', '.join(STRUCTURES)}.")


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


def _gaussian_family(structure: str) -> Family:
    kernel = "smi_kernels.noise.triton:gaussian"
    return Family(elements=4, values=_gaussian, kernel=kernel, structure=structure, native="gaussian")


for _structure, _name in ((INDEPENDENT, "gaussian"), (RANK1, "rank1"), (FLIPOUT, "flipout")):
    families.add(_name, _gaussian_family(_structure))
RADEMACHER = families.add(
    "rademacher",
    Family(elements=128, values=_rademacher, kernel="smi_kernels.noise.triton:rademacher", native="rademacher"),
)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Which draw: everything in a counter and its key but the tensor and the element.

    Attributes:
        seed: in [0, 2⁶⁴).
        k: index of the draw, from 0.
        stream: `PARAMETERS` or `INPUT`.
        antithetic: draws 2j and 2j + 1 are +E and −E.
    """

    seed: int
    k: int
    stream: int
    antithetic: bool = False

    @property
    def number(self) -> int:
        """Word 2 of the counter."""
        return self.k // 2 if self.antithetic else self.k

    @property
    def sign(self) -> float:
        """Factor +1 or −1 of the noise."""
        return -1.0 if self.antithetic and self.k % 2 else 1.0


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
        device: where to draw. The bits are the same everywhere.

    Returns:
        Tensor id to float32 noise of the tensor's shape, with mean 0 and variance 1.
    """
    which = Draw(seed=seed, k=k, stream=stream, antithetic=antithetic)
    device = torch.device(device)
    if family.structure == INDEPENDENT:
        sizes = {tensor: math.prod(shape) for tensor, shape in shapes.items()}
        values = _independent(family, sizes, which, device)
        return {tensor: values[tensor].reshape(tuple(shape)) for tensor, shape in shapes.items()}
    noise = {}
    for tensor, shape in shapes.items():
        first, *rest = factors(family, shape, tensor, which, device)
        noise[tensor] = combine(first, rest, shape, base=_base(family, shape, tensor, which, device))
    return noise


def factors(family: Family, shape: Sequence[int], tensor: int, which: Draw, device: torch.device) -> list[Tensor]:
    """The values that a structured family draws anew: ``[rows]``, and for two dimensions or more a second.

    For ``rank1`` these are a ``[rows]`` and b ``[columns]``; for ``flipout`` the signs s_out ``[rows]`` and s_in
    ``[shape[1]]``. The sign of an antithetic draw is in the first.
    """
    rows = shape[0] if shape else 1
    if family.structure == RANK1:
        columns = math.prod(shape[1:]) if len(shape) > 1 else 0
        source, stream = family, which.stream
    else:
        columns = shape[1] if len(shape) > 1 else 0
        source, stream = RADEMACHER, which.stream + SIGNS
    start = -(-rows // source.elements) * source.elements
    plain = Draw(seed=which.seed, k=which.number, stream=stream)
    values = _independent(source, {tensor: start + columns}, plain, device)[tensor]
    first = which.sign * values[:rows]
    return [first, values[start:]] if columns else [first]


def base(family: Family, shape: Sequence[int], tensor: int, which: Draw, device: torch.device) -> Tensor:
    """B of a flipout family, of the tensor's shape; the same for every draw."""
    zero = Draw(seed=which.seed, k=0, stream=which.stream)
    return _independent(family, {tensor: math.prod(shape)}, zero, device)[tensor].reshape(tuple(shape))


def _base(family: Family, shape: Sequence[int], tensor: int, which: Draw, device: torch.device) -> Tensor | None:
    return base(family, shape, tensor, which, device) if family.structure == FLIPOUT else None


def combine(rows: Tensor, rest: Sequence[Tensor], shape: Sequence[int], *, base: Tensor | None) -> Tensor:
    """Noise of a tensor's shape from the values of `factors`, and for flipout the `base`."""
    shape = tuple(shape)
    if base is None:
        return (rows[:, None] * rest[0] if rest else rows).reshape(shape)
    signs = rows.reshape(-1, *[1] * (len(shape) - 1)) if shape else rows.reshape(())
    if rest:
        signs = signs * rest[0].reshape(-1, *[1] * (len(shape) - 2))
    return base * signs


def _independent(family: Family, sizes: Mapping[int, int], which: Draw, device: torch.device) -> dict[int, Tensor]:
    """Elements 0 .. size of several tensors, float32 ``[size]`` each."""
    if not has_float64(device):  # `box_muller` takes one root by way of it
        drawn = _independent(family, sizes, which, torch.device("cpu"))
        return {tensor: values.to(device) for tensor, values in drawn.items()}
    if family.native is not None and device.type == "cpu" and native.library() is not None:
        noise = {tensor: torch.empty(size) for tensor, size in sizes.items()}
        for tensor, out in noise.items():
            stream = native.Stream(tensor, which.number, which.stream, which.seed & 0xFFFFFFFF, which.seed >> 32)
            native.fill(out, family.native, family.elements, 0, stream, which.sign)
        return noise
    blocks = {tensor: -(-size // family.elements) for tensor, size in sizes.items()}
    index = torch.cat([torch.arange(count, device=device) for count in blocks.values()])
    tensor_id = torch.cat([torch.full((count,), tensor, device=device) for tensor, count in blocks.items()])
    number = torch.tensor(which.number, device=device)
    last = torch.tensor(which.stream, device=device)
    key = (which.seed & 0xFFFFFFFF, which.seed >> 32)
    pieces = [
        family.values(philox((i, t, number, last), key))
        for i, t in zip(index.split(_CHUNK), tensor_id.split(_CHUNK), strict=True)
    ]
    values = which.sign * torch.cat(pieces).flatten()
    parts = values.split([count * family.elements for count in blocks.values()])
    return {tensor: part[: sizes[tensor]] for tensor, part in zip(sizes, parts, strict=True)}
