"""Natural images: what nobody made for this model, on which triggers are searched and the spread of features is seen.

Reconstructions are surer of their class than natural images are. A trigger that is searched on them is larger than it
need be, and their features lie closer together, so that a direction seems unused which natural images use. Public
images have neither fault, whatever they show.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from smi.domains.base import PublicImages, Samples
from smi.runtime.compute import predict
from smi.runtime.seeding import stream

SHOWN = 400  # public images that triggers are searched on
SPREAD = 2000  # public images whose features are looked at


def natural_images(model: nn.Module, samples: Samples, public: PublicImages | None, *, seed: int = 0) -> Samples:
    """Public images with the labels that ``model`` gives them, where there are any; else the samples.

    Args:
        model: The suspect.
        samples: Of every class.
        public: Unlabelled images, or None.
        seed: Of which are taken, if there are more than `SHOWN`.
    """
    if public is None:
        return samples
    chosen = torch.randperm(len(public), generator=stream(seed, "natural"))[:SHOWN]
    images = public.images[chosen]
    return Samples(images, predict(model, images).argmax(1), samples.num_classes, "public")


def joined(samples: Samples, natural: Samples) -> Samples:
    """Both, where they are not the same."""
    if natural is samples:
        return samples
    images, labels = (torch.cat([getattr(one, name) for one in (samples, natural)]) for name in ("images", "labels"))
    return replace(samples, images=images, labels=labels, scores=None)


def spread_of(samples: Samples, public: PublicImages | None) -> Tensor:
    """Images ``[N, C, H, W]`` whose features say how natural ones spread."""
    return samples.images if public is None else public.images[:: max(1, len(public) // SPREAD)]
