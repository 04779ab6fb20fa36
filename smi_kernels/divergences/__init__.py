"""Divergences between two predictions, in torch and in Triton."""

from smi_kernels.divergences.torch import Divergence, divergences, kl

__all__ = ["Divergence", "divergences", "kl"]
