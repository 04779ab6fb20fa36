"""Perceptual similarity of samples to real images, as an independent classifier sees them.

The judge is a classifier that the evaluator trained on clean private images with another seed: it shares neither the
backdoor nor the weights with the suspect model, whose own features an inversion could please without looking real.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smi.domains.base import PrivateSet, Samples
from smi.errors import InputError
from smi.inversion.selection import features
from smi.runtime.compute import predict


@dataclass(frozen=True)
class Similarity:
    """How much samples are like real images.

    Attributes:
        frechet: `frechet_distance` of their features, 0 or more.
        nearest: `nearest_distance`, about 1 for real images.
        accuracy: Share of the samples that the judge takes for their label, in [0, 1].
    """

    frechet: float
    nearest: float
    accuracy: float


def similarity(judge: nn.Module, samples: Samples, reference: Samples | PrivateSet) -> Similarity:
    """Similarity of ``samples`` to the real images ``reference``, in what the judge's last linear layer sees.

    Compare sets of the same size only: the Fréchet distance of a small set is biased upwards, by the more the smaller.
    """
    made, real = features(judge, samples.images), features(judge, reference.images)
    recognised = predict(judge, samples.images).argmax(1) == samples.labels
    return Similarity(frechet_distance(made, real), nearest_distance(made, real), recognised.double().mean().item())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to the features ``[N, D]`` and ``[M, D]``, in float64.

    ``‖μ_a − μ_b‖² + tr(C_a + C_b − 2 (C_a C_b)^{1/2})`` (Dowson & Landau, 1982; FID is this with Inception features).
    With ``C = XᵀX`` the last trace is the sum of the singular values of ``X_a X_bᵀ``: nothing is squared and rooted
    again, so that the distance of a set to itself is zero up to rounding even where covariances are singular.
    """
    a, b = _checked(a, b)
    root_a, root_b = _root(a), _root(b)
    spread = root_a.square().sum() + root_b.square().sum() - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()
    return (a.mean(0) - b.mean(0)).square().sum().item() + max(0.0, spread.item())


def nearest_distance(a: Tensor, b: Tensor) -> float:
    """Mean distance of ``a`` ``[N, D]`` to the nearest neighbour in ``b`` ``[M, D]``, in units of ``b``'s own.

    The unit is the median over ``b`` of the distance to the nearest other member, so that what is as close to ``b`` as
    its own members are comes out near 1 and copies of them as 0.
    """
    a, b = _checked(a, b)
    own = _distances(b, b).fill_diagonal_(torch.inf).amin(1).median()
    if own == 0:
        raise InputError("Most reference features have an exact double, so that they give no unit. Remove the doubles.")
    return (_distances(a, b).amin(1).mean() / own).item()


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for value in (a, b):
        if value.ndim != 2 or len(value) < 2 or not value.isfinite().all():
            raise InputError(
                f"Features are {tuple(value.shape)}. Allowed: finite [N, D] with N of 2 or more. Pass more images."
            )
    if a.shape[1] != b.shape[1]:
        raise InputError(f"Features have {a.shape[1]} and {b.shape[1]} dimensions. Take both from the same model.")
    return a.double(), b.double()


def _root(x: Tensor) -> Tensor:
    """R ``[≤D, D]`` with ``RᵀR`` the covariance of ``x``."""
    return torch.linalg.qr(x - x.mean(0), mode="r").R / (len(x) - 1) ** 0.5


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # the quick way gives doubles a distance
