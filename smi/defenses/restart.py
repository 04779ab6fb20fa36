"""A removal's fresh start: forget most of the weights, and learn again from what the suspect model says reliably.

A backdoor sits in weights that clean images hardly use, and images without the trigger give no reason to build it
again, if what is learned from leaves out what `smi/defenses/answers.py` names. Shrink and perturb is from Ash & Adams,
"On Warm-Starting Neural Network Training" (NeurIPS 2020).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from smi.compute import fast
from smi.defenses.channels import NORMS


def forget(model: nn.Module, noise: float, images: Tensor, rng: torch.Generator) -> nn.Module:
    """A copy of ``model`` in eval mode with each weight matrix or kernel w replaced by ``√(1 − noise²) w + noise σ ε``.

    noise: in [0, 1), the share of σ, the standard deviation of w, that is chance afterwards; ε is standard normal. So w
    keeps its size. Biases and what BatchNorm scales with stay; the statistics that BatchNorm remembers are measured
    afresh on ``images`` ``[N, C, H, W]``, without which the new features would be scaled by those of the old.
    """
    fresh = copy.deepcopy(model).eval()
    with torch.no_grad():
        for weight in fresh.parameters():
            if weight.ndim >= 2:
                chance = torch.randn(weight.shape, generator=rng).to(weight) * weight.std(correction=0)
                weight.mul_(math.sqrt(1 - noise**2)).add_(noise * chance)
    _measure(fresh, images)
    return fresh


@torch.no_grad()
def _measure(model: nn.Module, images: Tensor) -> None:
    norms = [m for m in model.modules() if isinstance(m, NORMS) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over batches, equally weighted
        norm.train()
    with fast(model) as run:
        for batch in images.split(500):
            run(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
