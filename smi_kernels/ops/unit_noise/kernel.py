"""Unit noise for given counters: what the fused kernels draw, by itself. For tests, backends and small tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.noise import Family
from smi_kernels.noise.triton import counter_noise
from smi_kernels.ops import launch
from smi_kernels.ops.launch import Draws


def unit_noise(
    index: Tensor, tensor: Tensor, *, family: Family, which: Draws, stream: int, block: int = 1024
) -> Tensor:
    """Unit noise for B counters and several draws, equal to `smi_kernels.noise.draw` bit for bit.

    Args:
        index: word 0 of the counters, blocks of elements: int64 or int32 ``[B]``, in [0, 2³²).
        tensor: word 1, tensor ids: like ``index``.
        family: the noise family; it must have a Triton twin. Its structure is not applied: these are its values.
        which: the draws.
        stream: `smi_kernels.noise.PARAMETERS` or ``INPUT``.
        block: elements in one program, a power of two from 128. Changes no bit.

    Returns:
        Float32 ``[draws, B, elements of the family per counter]``.

    Raises:
        InputError: for tensors or a family that cannot be used.
    """
    twin, (programs, first_number, signs) = launch.family_kernel(family), which.grid()
    launch.check_tensors(index=index, tensor=tensor)
    for name, words in (("index", index), ("tensor", tensor)):
        launch.check_shape(name, words, (index.numel(),))
        launch.check_dtype(name, words, torch.int64, torch.int32)
    out = torch.empty(which.count, len(index), family.elements, dtype=torch.float32, device=index.device)
    counters = max(1, block // family.elements)
    if not out.numel():
        return out
    with launch.on_device(out):
        _unit_noise[(triton.cdiv(len(index), counters), programs)](
            index, tensor, out, len(index), which.first, first_number, which.count, *launch.key_words(which.seed),
            launch.as_word(stream), FAMILY=twin, ELEMENTS=family.elements, SIGNS=signs, COUNTERS=counters,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["count", "first", "first_number", "draws", "key_low", "key_high", "stream"])
def _unit_noise(
    index: tl.tensor, tensor: tl.tensor, out: tl.tensor, count: tl.tensor, first: tl.tensor, first_number: tl.tensor,
    draws: tl.tensor, key_low: tl.tensor, key_high: tl.tensor, stream: tl.tensor, FAMILY: tl.constexpr,
    ELEMENTS: tl.constexpr, SIGNS: tl.constexpr, COUNTERS: tl.constexpr,
) -> None:  # fmt: skip
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
