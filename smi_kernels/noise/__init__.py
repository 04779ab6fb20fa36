"""Noise: what is drawn for an image or a parameter tensor, in torch and in Triton, from Philox counters."""

from smi_kernels.noise.torch import (
    FLIPOUT,
    INDEPENDENT,
    INPUT,
    PARAMETERS,
    RANK1,
    SIGNS,
    STRUCTURES,
    Draw,
    Family,
    base,
    combine,
    draw,
    factors,
    families,
)  # fmt: skip

__all__ = [
    "FLIPOUT", "INDEPENDENT", "INPUT", "PARAMETERS", "RANK1", "SIGNS", "STRUCTURES", "Draw", "Family", "base",
    "combine", "draw", "factors", "families",
]  # fmt: skip
