"""Stability scoring by perturbed forward passes. Knows nothing of `smi`."""

from smi_kernels.divergences import Divergence
from smi_kernels.errors import InputError, unknown_name
from smi_kernels.noise import Family
from smi_kernels.registry import Registry
from smi_kernels.scores import stability_scores

__all__ = [
    "Divergence",
    "Family",
    "InputError",
    "Registry",
    "stability_scores",
    "unknown_name",
]
