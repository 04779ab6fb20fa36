"""A removal's fresh start: forget most of the weights, and learn again from what the suspect model says reliably.

A backdoor sits in weights that clean images hardly use, and images without the trigger give no reason to build it
again. Two things would all the same, and are left out: the suspect's probabilities, of which the small ones tell how
near an image is to the trigger (so its labels alone), and labels that it gives to one variation of an image and not to
another (as where a variation resembles the trigger). Shrink and perturb is from Ash & Adams, "On Warm-Starting Neural
Network Training" (NeurIPS 2020).
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.augment import vary
from smi.compute import Runner, fast, frozen, predict
from smi.defenses.base import ask
from smi.defenses.channels import NORMS
from smi.domains.base import PublicImages


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


class TrustedLabels:
    """Cross-entropy with the suspect's labels on varied samples and public images, where they are to be trusted.

    A label is trusted where the suspect gives it to the variation and to the image as it is; for a sample, the label
    that it comes with stands for the latter. Variations are those of `smi.augment.vary`, afresh each step.
    """

    def __init__(self, model: nn.Module, public: PublicImages | None, rng: torch.Generator) -> None:
        self._suspect, self._rng = frozen(model), rng
        self._images = None if public is None else public.images
        self._labels = None if public is None else predict(self._suspect, public.images).argmax(1)

    def __call__(self, run: Runner, images: Tensor, labels: Tensor) -> Tensor:
        """Scalar loss on ``images`` ``[N, C, H, W]`` with ``labels`` ``[N]``, and as many public images."""
        if self._images is not None and self._labels is not None:
            extra = torch.randint(len(self._images), (len(images),), generator=self._rng)
            images = torch.cat([images, self._images[extra].to(images.device)])
            labels = torch.cat([labels, self._labels[extra].to(labels.device)])
        varied = vary(images, self._rng)
        trusted = (ask(self._suspect, varied).argmax(1) == labels).float()
        losses = F.cross_entropy(run(varied), labels, reduction="none")
        return (losses * trusted).sum() / trusted.sum().clamp(min=1)
