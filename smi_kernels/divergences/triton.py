"""Divergences in Triton, for use inside kernels: the twins of `smi_kernels.divergences.torch`.

All take float32 blocks of clean and perturbed logits ``[ROWS, CLASSES]`` (−inf where there is no class), int64 labels
``[ROWS]`` and a mask ``[1, CLASSES]`` of the classes that exist, and give a float32 block ``[ROWS]``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kl(clean: tl.tensor, perturbed: tl.tensor, labels: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """KL(p ‖ q) in nats as Σ p (eᵈ − 1 − d), d = log q − log p; see `smi_kernels.divergences.kl` for why."""
    log_p, log_q = _log_softmax(clean, mask), _log_softmax(perturbed, mask)
    d = log_q - log_p
    p = tl.where(mask, tl.exp(log_p), 0.0)
    near = p * _exp_minus_tangent(tl.minimum(d, 1.0))
    far = tl.exp(log_q) - p - p * d
    return tl.sum(tl.where(mask, tl.where(d < 1.0, near, far), 0.0), 1)


@triton.jit
def cross_entropy(clean: tl.tensor, perturbed: tl.tensor, labels: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """−log q_y in nats."""
    own = _is_label(labels, mask)
    return -1.0 * tl.sum(tl.where(own, _log_softmax(perturbed, mask), 0.0), 1)


@triton.jit
def total_variation(clean: tl.tensor, perturbed: tl.tensor, labels: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """½ Σ |p − q|."""
    difference = tl.exp(_log_softmax(clean, mask)) - tl.exp(_log_softmax(perturbed, mask))
    return 0.5 * tl.sum(tl.where(mask, tl.abs(difference), 0.0), 1)


@triton.jit
def margin(clean: tl.tensor, perturbed: tl.tensor, labels: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Drop of the margin z_y − max_{j≠y} z_j."""
    own = _is_label(labels, mask)
    return _margin(clean, own) - _margin(perturbed, own)


@triton.jit
def flip(clean: tl.tensor, perturbed: tl.tensor, labels: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """1 where the predicted class changed, else 0; the lowest class wins a tie."""
    return (_predicted(clean, mask) != _predicted(perturbed, mask)).to(tl.float32)


@triton.jit
def _log_softmax(logits: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Log-softmax over dimension 1; 0 where there is no class, so that nothing computed from it is infinite."""
    shifted = logits - tl.max(logits, 1)[:, None]
    total = tl.sum(tl.exp(shifted), 1)[:, None]
    return tl.where(mask, shifted - tl.log(total), 0.0)


@triton.jit
def _exp_minus_tangent(d: tl.tensor) -> tl.tensor:
    """eᵈ − 1 − d: a Taylor polynomial where the three terms cancel. The relative error is below 1e-6 for d ≤ 1."""
    p = d * (1.0 / 362880) + 1.0 / 40320
    p = p * d + 1.0 / 5040
    p = p * d + 1.0 / 720
    p = p * d + 1.0 / 120
    p = p * d + 1.0 / 24
    p = p * d + 1.0 / 6
    p = p * d + 0.5
    return tl.where(tl.abs(d) < 0.5, d * d * p, tl.exp(d) - 1.0 - d)


@triton.jit
def _is_label(labels: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return tl.arange(0, mask.shape[1])[None, :] == labels[:, None]


@triton.jit
def _margin(logits: tl.tensor, own: tl.tensor) -> tl.tensor:
    others = tl.max(tl.where(own, float("-inf"), logits), 1)
    return tl.sum(tl.where(own, logits, 0.0), 1) - others


@triton.jit
def _predicted(logits: tl.tensor, mask: tl.tensor) -> tl.tensor:
    classes = tl.arange(0, mask.shape[1])[None, :]
    best = logits == tl.max(logits, 1)[:, None]
    return tl.min(tl.where(best, classes, mask.shape[1]), 1)
