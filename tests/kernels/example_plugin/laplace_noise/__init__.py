"""A package of another author: Laplace noise, the Hellinger distance and the hard swish, for `smi_kernels`.

Its entry point (see `../laplace_noise-1.0.dist-info/entry_points.txt`) names this module, which registers all three.
The Triton twins are in `kernels.py` and go by name, so that triton is imported only where they run.
"""

import torch
from torch import nn
from torch.nn import functional as F

from smi_kernels import Divergence, Epilogue, Family
from smi_kernels.divergences import divergences
from smi_kernels.epilogues import epilogues
from smi_kernels.noise import families
from smi_kernels.noise.philox import uniform


def laplace(words):
    """Variance 1 from each word: the sign is its first bit, the size that of an exponential variable."""
    return torch.stack([_from_word(word) for word in words], dim=1)


def _from_word(word):
    # uniform() maps w and ~w, which differ in the sign bit, to the same number: the bit is independent of it.
    size = -(0.5**0.5) * torch.log(uniform(word).clamp(min=1e-7))
    return torch.where(word >= 2**31, -size, size)


def hellinger(clean, perturbed, labels=None):
    """½ Σ (√p − √q)², the squared Hellinger distance, as 1 − Σ √(p q) would not be: near 0 that has no digits."""
    p, q = clean.log_softmax(1), perturbed.log_softmax(1)
    return 0.5 * ((p / 2).exp() - (q / 2).exp()).square().sum(1)


families.add("laplace", Family(elements=4, values=laplace, kernel="laplace_noise.kernels:laplace"))
divergences.add("hellinger", Divergence(compute=hellinger, kernel="laplace_noise.kernels:hellinger"))
epilogues.add(
    "hardswish",
    Epilogue(compute=F.hardswish, kernel="laplace_noise.kernels:hardswish", matches=(nn.Hardswish, F.hardswish)),
)
