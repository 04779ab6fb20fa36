"""Divergences between the predictions on an image and on a perturbed image by a perturbed model.

Each takes logits in float32 (or float64), whatever the model ran in: scores of confident models are of order 1e-4,
which a log-softmax in bfloat16 cannot represent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_kernels.registry import Kernel, Registry


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A function of clean logits ``[N, C]``, perturbed logits ``[N, C]`` and labels ``[N]`` that gives ``[N]``.

    Attributes:
        compute: the function. Lower means more stable.
        needs_labels: whether it reads the labels; without it they may be None.
        kernel: the twin of ``compute`` in Triton, a ``@triton.jit`` function or "module:name" of one. It maps float32
            blocks of clean and perturbed logits ``[ROWS, CLASSES]``, int64 labels ``[ROWS]`` and a mask
            ``[1, CLASSES]`` of the classes that exist (padded logits are −inf) to a float32 block ``[ROWS]``. None: the
            Triton backend does not support the divergence.
    """

    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    needs_labels: bool = False
    kernel: Kernel = None


divergences: Registry[Divergence] = Registry("divergence")
"""Divergences by name. Add one with ``divergences.add(name, Divergence(compute=...))``."""


def kl(clean: Tensor, perturbed: Tensor, labels: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence KL(p ‖ q) = Σ p log(p / q) ≥ 0 in nats; p clean, q perturbed, labels unused.

    Summed as Σ p (eᵈ − 1 − d) with d = log q − log p, which is the same because p and q each sum to 1. Every term is
    at least 0 and of second order in d, so that no terms of order d have to cancel: near 0 the direct sum loses most
    of its digits in float32. Where q is larger than p by a factor e the term is written q − p − p d, which cannot
    overflow.
    """
    log_p, log_q = clean.log_softmax(1), perturbed.log_softmax(1)
    d = log_q - log_p
    p = log_p.exp()
    near = p * (torch.expm1(d.clamp(max=1)) - d)
    far = log_q.exp() - p - p * d
    return torch.where(d < 1, near, far).sum(1)


def cross_entropy(clean: Tensor, perturbed: Tensor, labels: Tensor | None) -> Tensor:
    """Cross-entropy −log q_y ≥ 0 in nats of the perturbed prediction to the label y.

    It measures the perturbed prediction alone, so that without perturbation it is the ordinary cross-entropy, not 0.
    """
    assert labels is not None
    return F.cross_entropy(perturbed, labels, reduction="none")


def total_variation(clean: Tensor, perturbed: Tensor, labels: Tensor | None = None) -> Tensor:
    """Total variation distance ½ Σ |p − q| in [0, 1]; labels unused."""
    return 0.5 * (clean.softmax(1) - perturbed.softmax(1)).abs().sum(1)


def margin(clean: Tensor, perturbed: Tensor, labels: Tensor | None) -> Tensor:
    """Drop of the margin z_y − max_{j≠y} z_j of the label y, in logits; negative where the margin grew."""
    assert labels is not None
    return _margin(clean, labels) - _margin(perturbed, labels)


def flip(clean: Tensor, perturbed: Tensor, labels: Tensor | None = None) -> Tensor:
    """1 where the predicted class changed, else 0; labels unused. It has no gradient."""
    return (clean.argmax(1) != perturbed.argmax(1)).to(clean.dtype)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    own = labels[:, None]
    others = logits.scatter(1, own, -torch.inf)
    return logits.gather(1, own).squeeze(1) - others.amax(1)


_KERNELS = "smi_kernels.divergences.triton"
divergences.add("kl", Divergence(compute=kl, kernel=f"{_KERNELS}:kl"))
divergences.add(
    "cross_entropy", Divergence(compute=cross_entropy, needs_labels=True, kernel=f"{_KERNELS}:cross_entropy")
)
divergences.add("total_variation", Divergence(compute=total_variation, kernel=f"{_KERNELS}:total_variation"))
divergences.add("margin", Divergence(compute=margin, needs_labels=True, kernel=f"{_KERNELS}:margin"))
divergences.add("flip", Divergence(compute=flip, kernel=f"{_KERNELS}:flip"))
