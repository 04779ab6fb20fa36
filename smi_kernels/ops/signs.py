"""Weights plus or minus a standard deviation, inside the tiles of a product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from smi_kernels.ops.launch import interpreting


@triton.jit
def perturb_by_sign(
    theta: tl.tensor, words: tl.tensor, bit: tl.tensor, std: tl.tensor, ROUND: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """theta + std · sign, rounded to theta's dtype; the sign is bit ``bit`` of ``words``, 0 for +.

    ROUND: None, or the 16-bit dtype to which the sum is rounded because theta, in float32, stands for it (`rounding`).
    """
    flip = (words.to(tl.uint32, bitcast=True) << (31 - bit).to(tl.uint32)) & 0x80000000
    noise = (flip ^ tl.cast(std, tl.float32).to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    total = theta.to(tl.float32) + noise
    if ROUND == tl.float16:  # noqa: SIM300
        total = total.to(tl.float16).to(tl.float32)
    if tl.bfloat16 == ROUND:  # noqa: SIM300; on the bits, because the interpreter lacks bfloat16
        code = total.to(tl.uint32, bitcast=True)
        code = (code + 0x7FFF + ((code >> 16) & 1)) & 0xFFFF0000
        total = code.to(tl.float32, bitcast=True)
    return total.to(theta.dtype)


def rounding(dtype: torch.dtype) -> tl.dtype | None:
    """ROUND of `perturb_by_sign` for weights of ``dtype``: in the interpreter, kernels see 16 bits as float32."""
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype) if interpreting() else None
