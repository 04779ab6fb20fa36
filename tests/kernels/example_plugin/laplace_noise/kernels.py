"""The Triton twins."""

import triton
import triton.language as tl

from smi_kernels.noise.triton import uniform


@triton.jit
def laplace(w0, w1, w2, w3):
    """Four uint32 blocks of words to four float32 blocks."""
    return _from_word(w0), _from_word(w1), _from_word(w2), _from_word(w3)


@triton.jit
def _from_word(word):
    size = -0.7071067811865476 * tl.log(tl.maximum(uniform(word), 1e-7))
    return tl.where((word >> 31) == 1, -1.0 * size, size)


@triton.jit
def hellinger(clean, perturbed, labels, mask):
    """Blocks of logits ``[ROWS, CLASSES]`` to ``[ROWS]``."""
    change = _root(clean, mask) - _root(perturbed, mask)
    return 0.5 * tl.sum(change * change, 1)


@triton.jit
def _root(logits, mask):
    shifted = logits - tl.max(logits, 1)[:, None]
    total = tl.sum(tl.exp(shifted), 1)[:, None]
    return tl.where(mask, tl.exp(0.5 * (shifted - tl.log(total))), 0.0)


@triton.jit
def hardswish(x):
    """x · min(max(x + 3, 0), 6) / 6."""
    return x * tl.where(x < -3.0, 0.0, tl.where(x > 3.0, 6.0, x + 3.0)) / 6.0
