"""Activations in Triton, the twins of `smi_kernels.epilogues`: float32 block to float32 block.

A kernel takes one as a ``tl.constexpr`` argument and applies it before it stores a layer's output. As in torch, NaN
stays NaN: ``tl.maximum`` would turn it into 0 and hide a diverged layer. `finish` is the end that every layer's kernel
shares.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def identity(x: tl.tensor) -> tl.tensor:
    """x."""
    return x


@triton.jit
def relu(x: tl.tensor) -> tl.tensor:
    """max(x, 0)."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def relu6(x: tl.tensor) -> tl.tensor:
    """min(max(x, 0), 6)."""
    return tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))


@triton.jit
def silu(x: tl.tensor) -> tl.tensor:
    """x / (1 + exp(−x))."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gelu(x: tl.tensor) -> tl.tensor:
    """x Φ(x), with the error function (not the tanh approximation)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def finish(
    acc: tl.tensor, scale: tl.tensor, bias: tl.tensor, residual: tl.tensor, y: tl.tensor, draw: tl.tensor,
    row: tl.tensor, column: tl.tensor, rows: tl.tensor, columns: tl.tensor, mask: tl.tensor, EPILOGUE: tl.constexpr,
) -> None:  # fmt: skip
    """Store ``EPILOGUE(acc · scale + bias + residual)``, computed in float32.

    Args:
        acc: float32 block of sums.
        scale: float32 ``[draws, columns]`` or None.
        bias: likewise.
        residual: ``[draws, rows, columns]`` or None.
        y: ``[draws, rows, columns]``.
        draw: int64, because draws · rows · columns may pass 2³¹; rows · columns may not.
        row: int32 block that broadcasts to acc's shape.
        column: likewise.
        rows: of y.
        columns: of y.
        mask: what to store.
        EPILOGUE: a ``@triton.jit`` function of one block.
    """
    if scale is not None:
        acc *= tl.load(scale + draw * columns + column, mask=column < columns, other=0.0)
    if bias is not None:
        acc += tl.load(bias + draw * columns + column, mask=column < columns, other=0.0)
    start = draw * rows * columns
    offset = row * columns + column
    if residual is not None:
        acc += tl.load(residual + start + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + start + offset, EPILOGUE(acc).to(y.dtype.element_ty), mask=mask)
