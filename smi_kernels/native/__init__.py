"""Noise, perturbed weights and convolutions in C, built when first needed, where there is a compiler.

Noise has the same bits as in torch, several times faster: torch needs about a hundred passes over memory for one
Philox, a C compiler does them in registers. Without the library everything runs in torch; ``SMI_KERNELS_NATIVE=0``
asks for that.
"""

from smi_kernels.native.build import library
from smi_kernels.native.conv import convolve, convolves
from smi_kernels.native.noise import Stream, fill, perturb_vectors, perturb_weights

__all__ = ["Stream", "convolve", "convolves", "fill", "library", "perturb_vectors", "perturb_weights"]
