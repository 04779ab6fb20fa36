"""From logits to scores in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from smi_kernels.divergences import Divergence
from smi_kernels.divergences.reductions import reductions


def score_logits(
    clean: Tensor, perturbed: Tensor, labels: Tensor | None = None, *, divergence: Divergence, reduce: str = "mean"
) -> Tensor:
    """Divergences of perturbed logits ``[K, N, C]``, reduced over the draws."""
    draws = torch.stack([divergence.compute(clean, q, labels) for q in perturbed], dim=1)
    return reductions[reduce](draws).contiguous()
