"""Unit noise for given counters: what the fused kernels draw, by itself. For tests, backends and small tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.errors import InputError
from smi_kernels.noise import Family
from smi_kernels.noise.triton import counter_noise
from smi_kernels.ops.launch import as_word, check_dtype, check_shape, check_tensors, key_words, on_device
from smi_kernels.registry import load_kernel


def unit_noise(
    index: Tensor,
    tensor: Tensor,
    *,
    family: Family,
    first: int,
    draws: int,
    seed: int,
    stream: int,
    antithetic: bool = False,
    block: int = 1024,
) -> Tensor:
    """Unit noise for B counters and several draws, equal to `smi_kernels.noise.draw` bit for bit.

    Args:
        index: word 0 of the counters, blocks of elements: int64 or int32 ``[B]``, in [0, 2³²).
        tensor: word 1, tensor ids: like ``index``.
        family: the noise family; it must have a Triton twin. Its structure is not applied: these are its values.
        first: index of the first draw, from 0.
        draws: number of draws from 1.
        seed: in [0, 2⁶⁴).
        stream: `smi_kernels.noise.PARAMETERS` or ``INPUT``.
        antithetic: draws 2j and 2j + 1 are +E and −E.
        block: elements in one program, a power of two from 128. Changes no bit.

    Returns:
        Float32 ``[draws, B, elements of the family per counter]``.

    Raises:
        InputError: for tensors, numbers or a family that cannot be used.
    """
    twin = family_kernel(family)
    draws_grid, first_number, signs = number_grid(first, draws, antithetic)
    check_tensors(index=index, tensor=tensor)
    check_shape("index", index, (index.numel(),))
    check_shape("tensor", tensor, (index.numel(),))
    check_dtype("index", index, torch.int64, torch.int32)
    check_dtype("tensor", tensor, torch.int64, torch.int32)
    low, high = key_words(seed)
    out = torch.empty(draws, len(index), family.elements, dtype=torch.float32, device=index.device)
    counters = max(1, block // family.elements)
    if not out.numel():
        return out
    with on_device(out):
        _unit_noise[(triton.cdiv(len(index), counters), draws_grid)](
            index, tensor, out, len(index), first, first_number, draws, low, high, as_word(stream),
            FAMILY=twin, ELEMENTS=family.elements, SIGNS=signs, COUNTERS=counters, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def family_kernel(family: Family) -> object:
    """The Triton twin of a family.

    Raises:
        InputError: for a family without one.
    """
    if family.kernel is None:
        raise InputError("The noise family has no Triton kernel. Pass Family(kernel=...), or use the torch backend.")
    return load_kernel(family.kernel)


def number_grid(first: int, draws: int, antithetic: bool) -> tuple[int, int, int]:
    """How a grid dimension of programs covers the draws: an antithetic pair is drawn once and stored twice.

    Program i draws number n = first_number + i of the counter, and stores it as draws n·signs + s, s in [0, signs),
    negated for s = 1, as far as they lie in [first, first + draws).

    Returns:
        (programs, first_number, signs).

    Raises:
        InputError: for draws outside [0, 2³¹), or fewer than one or more than 65535 of them.
    """
    if draws < 1 or draws > 65535 or first < 0 or first + draws >= 1 << 31:
        raise InputError(f"first={first} and draws={draws} cannot be used. Allowed: 1 to 65535 draws in [0, 2³¹).")
    signs = 2 if antithetic else 1
    first_number = first // signs
    return (first + draws - 1) // signs - first_number + 1, first_number, signs


@triton.jit(do_not_specialize=["count", "first", "first_number", "draws", "key_low", "key_high", "stream"])
def _unit_noise(
    index: tl.tensor,
    tensor: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    first: tl.tensor,
    first_number: tl.tensor,
    draws: tl.tensor,
    key_low: tl.tensor,
    key_high: tl.tensor,
    stream: tl.tensor,
    FAMILY: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SIGNS: tl.constexpr,
    COUNTERS: tl.constexpr,
) -> None:
    number = first_number + tl.program_id(1)
    counter = tl.program_id(0) * COUNTERS + tl.arange(0, COUNTERS)[None, :]
    exists = counter < count
    words0 = tl.load(index + counter, exists, other=0)
    words1 = tl.load(tensor + counter, exists, other=0)
    noise = counter_noise(FAMILY, ELEMENTS, key_low, key_high, words0, words1, number, stream)

    size = tl.cast(count, tl.int64) * ELEMENTS
    element = tl.program_id(0).to(tl.int64) * (COUNTERS * ELEMENTS) + tl.arange(0, COUNTERS * ELEMENTS)[None, :]
    for s in tl.static_range(SIGNS):
        draw = number * SIGNS + s - first
        if (draw >= 0) & (draw < draws):
            tl.store(out + draw * size + element, noise if s == 0 else -1.0 * noise, element < size)
