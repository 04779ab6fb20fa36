"""The removal as one call: reconstruct images of the suspect's classes, repair it with them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from smi.defenses import Defense, Erasure, Repair
from smi.domains.base import PublicImages, Samples, check_public
from smi.inversion import Inversion, Stabilized, invert
from smi.inversion.selection import Selection
from smi.priors.base import Prior, check_prior, random_images
from smi.runtime.checks import check_model
from smi.runtime.seeding import derive, stream

PER_CLASS = 30
STAGES = ("inversion", "removal")
HELD_OUT = 5  # a class
STAND_INS = 2000  # images of the prior, where there are no public ones


@dataclass(frozen=True, eq=False)
class Cleaned:
    """What `remove_backdoor` returns: the repaired model, the reconstructions it was repaired with, the details."""

    model: nn.Module
    samples: Samples
    repair: Repair

    def __repr__(self) -> str:
        return f"Cleaned({self.repair}, {self.samples})"


def remove_backdoor(
    model: nn.Module,
    prior: Prior,
    public: PublicImages | None = None,
    *,
    inversion: Inversion | None = None,
    selection: Selection | None = None,
    defense: Defense | None = None,
    per_class: int = PER_CLASS,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Cleaned:
    """Remove a backdoor from ``model`` without any clean data.

    The model passed in is left as it is.

    Args:
        model: Images ``[N, C, H, W]`` in [0, 1] to logits.
        prior: A generator of public images of that shape.
        public: Unlabelled public images, on which triggers are searched and the repaired model is held to the suspect's
            outputs; where there are none, images that the prior makes of random latents stand in for them.
        inversion: How images are reconstructed. Default: `Stabilized`.
        selection: Which reconstructions are kept. Default: `Selection`.
        defense: How the model is repaired. Default: `Erasure`.
        per_class: Reconstructions a class.
        seed: Of everything random.
        checkpoint: A folder for the state of the work, from which it goes on where it was stopped, to the same weights.

    Raises:
        InputError: Before any work where the pieces do not fit together.

    >>> import smi
    >>> suspect, prior = smi.load_classifier("digits-badnets"), smi.load_prior("digits")
    >>> quick = smi.defenses.IBAU(rounds=1)  # for this example
    >>> remove_backdoor(suspect, prior, inversion=smi.Latent(steps=1), defense=quick, per_class=2)
    Cleaned(Repair(by ibau on latent samples), Samples(20 latent images of 10 classes, (1, 32, 32)))
    """
    check_prior(prior)
    check_public(public, prior.image_shape)
    defense = defense or Erasure()
    empty = torch.zeros(2, *prior.image_shape)
    check_model(model, empty)
    defense.check_fits(model, empty)
    at = {name: None if checkpoint is None else Path(checkpoint) / f"{name}.safetensors" for name in STAGES}
    samples = invert(
        model, prior, inversion or Stabilized(),
        per_class=per_class, selection=selection or Selection(), seed=seed, checkpoint=at["inversion"],
    )  # fmt: skip
    if public is None:
        public = PublicImages(random_images(prior, STAND_INS, stream(seed, "public")))
    repair = defense.repair(model, samples, public, seed=seed, checkpoint=at["removal"])
    return Cleaned(repair.model, samples, repair)


def held_out_samples(model: nn.Module, prior: Prior, *, seed: int = 0, checkpoint: str | Path | None = None) -> Samples:
    """A few more reconstructions of every class of the suspect. Not chosen by stability.

    They are for comparing it with a repaired model that never saw them.

    Args:
        model: The suspect.
        prior: What it is inverted with.
        seed: Of the run; they are drawn from a stream of their own.
        checkpoint: A file for the state of the work.
    """
    other = derive(seed, "held out")
    samples = invert(model, prior, Stabilized(), per_class=HELD_OUT, seed=other, checkpoint=checkpoint)
    return replace(samples, source="held out")
