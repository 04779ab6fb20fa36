"""From logits to scores in one kernel: softmax, divergence and the reduction over draws, in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.divergences import Divergence
from smi_kernels.errors import InputError, unknown_name
from smi_kernels.ops.launch import check_dtype, check_shape, check_tensors, next_power_of_two, on_device
from smi_kernels.registry import load_kernel

REDUCTIONS = {"mean": 0, "max": 1, "none": 2}
"""Reductions over draws. The values are the kernel's constants."""


def score_logits(
    clean: Tensor,
    perturbed: Tensor,
    labels: Tensor | None = None,
    *,
    divergence: Divergence,
    reduce: str = "mean",
    block: int = 2048,
    num_warps: int = 4,
) -> Tensor:
    """Divergences between clean and perturbed logits, reduced over the draws.

    The mean is summed in the order of the draws and then divided, so the same logits give the same bits.

    Args:
        clean: float32 ``[N, C]``.
        perturbed: float32 ``[K, N, C]``.
        labels: int64 ``[N]`` in [0, C); None if the divergence needs none.
        divergence: the divergence; it must have a Triton twin.
        reduce: ``mean``, ``max``, or ``none`` for all draws.
        block: logits of one draw in one program, a power of two; one row at least, of C rounded up to a power of two.
        num_warps: of one program.

    Returns:
        Float32 ``[N]``, or ``[N, K]`` for ``none``.

    Raises:
        InputError: for tensors, a reduction or a divergence that cannot be used.
    """
    if reduce not in REDUCTIONS:
        raise unknown_name("reduction", reduce, REDUCTIONS)
    _check(clean, perturbed, labels, divergence)
    k, n, classes = perturbed.shape
    padded = next_power_of_two(classes)
    rows = max(1, min(block // padded, next_power_of_two(n)))
    out = torch.empty((n, k) if reduce == "none" else (n,), dtype=torch.float32, device=clean.device)
    with on_device(clean):
        _score_logits[(triton.cdiv(n, rows),)](
            clean, perturbed, labels, out, n,
            DIVERGENCE=load_kernel(divergence.kernel), REDUCTION=REDUCTIONS[reduce], K=k, CLASSES=classes,
            CLASSES_PADDED=padded, ROWS=rows, num_warps=num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _check(clean: Tensor, perturbed: Tensor, labels: Tensor | None, divergence: Divergence) -> None:
    if divergence.kernel is None:
        raise InputError("The divergence has no Triton kernel. Pass Divergence(kernel=...), or use the torch backend.")
    if divergence.needs_labels and labels is None:
        raise InputError("The divergence needs labels. Pass labels, int64 [N].")
    check_tensors(clean=clean, perturbed=perturbed, labels=labels)
    if perturbed.ndim != 3 or not perturbed.numel():
        raise InputError(f"perturbed has shape {list(perturbed.shape)}. Allowed: [K, N, C], not empty.")
    check_shape("clean", clean, tuple(perturbed.shape[1:]))
    check_shape("labels", labels, tuple(perturbed.shape[1:2]))
    check_dtype("clean", clean, torch.float32)
    check_dtype("perturbed", perturbed, torch.float32)
    check_dtype("labels", labels, torch.int64)


@triton.jit(do_not_specialize=["n"])
def _score_logits(
    clean: tl.tensor, perturbed: tl.tensor, labels: tl.tensor, out: tl.tensor, n: tl.tensor, DIVERGENCE: tl.constexpr,
    REDUCTION: tl.constexpr, K: tl.constexpr, CLASSES: tl.constexpr, CLASSES_PADDED: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    first = tl.program_id(0) * ROWS
    exists = first + tl.arange(0, ROWS) < n
    row = tl.minimum(first + tl.arange(0, ROWS), n - 1).to(tl.int64)  # past the end: the last again, not stored
    column = tl.arange(0, CLASSES_PADDED)[None, :]
    mask = column < CLASSES
    place = row[:, None] * CLASSES + column
    p = tl.load(clean + place, mask, other=float("-inf"))
    y = tl.zeros([ROWS], tl.int64)
    if labels is not None:
        y = tl.load(labels + row)

    total = tl.full([ROWS], float("-inf") if REDUCTION == 1 else 0.0, tl.float32)
    # A constant bound: Triton 3.6's interpreter cannot loop to a runtime bound with NumPy from 2.4 on.
    for k in range(K):
        q = tl.load(perturbed + tl.cast(k, tl.int64) * n * CLASSES + place, mask, other=float("-inf"))
        score = DIVERGENCE(p, q, y, mask)
        if REDUCTION == 0:
            total += score
        elif REDUCTION == 1:
            total = tl.maximum(total, score, propagate_nan=tl.PropagateNan.ALL)
        else:
            tl.store(out + row * K + k, score, exists)
    if REDUCTION == 0:
        total = tl.div_rn(total, tl.full([ROWS], K, tl.float32))
    if REDUCTION != 2:
        tl.store(out + row, total, exists)
