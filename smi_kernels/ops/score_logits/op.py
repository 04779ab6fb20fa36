"""``torch.ops.smi_kernels.score_logits``."""

# No "from __future__ import annotations": torch reads the operator's schema from the annotations.

from torch import Tensor
from torch.library import custom_op

from smi_kernels.divergences import divergences
from smi_kernels.ops.launch import launched
from smi_kernels.ops.score_logits import reference


@custom_op("smi_kernels::score_logits", mutates_args=())
def score_logits(clean: Tensor, perturbed: Tensor, labels: Tensor | None, divergence: str, reduce: str) -> Tensor:
    """See `smi_kernels.ops.score_logits.kernel`."""
    score = launched(reference.score_logits, clean)
    return score(clean, perturbed, labels, divergence=divergences[divergence], reduce=reduce)


@score_logits.register_fake
def _(clean: Tensor, perturbed: Tensor, labels: Tensor | None, divergence: str, reduce: str) -> Tensor:
    k, n, _ = perturbed.shape
    return clean.new_empty((n, k) if reduce == "none" else (n,))
