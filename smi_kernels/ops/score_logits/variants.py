"""What the gate compiles of scores."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from smi_kernels.aot import Expects, Variant, empty, recorded
from smi_kernels.divergences import divergences
from smi_kernels.ops.score_logits.kernel import score_logits


def variants() -> Iterator[Variant]:
    """All divergences, all reductions; few classes and many."""

    def call(divergence: str, reduce: str, classes: int) -> None:
        labels = empty(256, dtype=torch.int64) if divergences[divergence].needs_labels else None
        clean, perturbed = empty(256, classes), empty(16, 256, classes)
        score_logits(clean, perturbed, labels, divergence=divergences[divergence], reduce=reduce)

    cases = [("kl", "mean", 1000), ("cross_entropy", "none", 10), ("total_variation", "max", 10)]
    cases += [("margin", "mean", 10), ("flip", "mean", 10)]
    for divergence, reduce, classes in cases:
        name = f"{divergence} {reduce} {classes} classes"
        yield from recorded(name, partial(call, divergence, reduce, classes), expects=Expects(max_registers=128))
