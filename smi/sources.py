"""Where the samples of a removal may come from, behind one interface, the same number each: SMI and its controls.

Every source but ``clean`` is what a defender could have made: from the suspect model, the prior and public images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from smi.domains.base import PrivateSet, PublicImages, Samples
from smi.errors import InputError
from smi.evaluation import clean_control
from smi.inversion import DeepInversion, Inversion, Latent, Pixel, Stabilized, invert
from smi.inversion.selection import Selection
from smi.priors.base import Prior, random_images
from smi.runtime.checks import check_number
from smi.runtime.compute import predict
from smi.runtime.seeding import stream
from smi_kernels import Registry


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceInputs:
    """What samples are made from.

    Attributes:
        model: The suspect, images in [0, 1] to logits.
        prior: The defender's; None will do where a source needs none.
        public: The defender's.
        per_class: Images a class, or as many in all where labels come from the model.
        seed: Of everything random.
        private: For the control ``clean`` alone, from the evaluator.
    """

    model: nn.Module
    prior: Prior | None
    public: PublicImages
    per_class: int = 30
    seed: int = 0
    private: PrivateSet | None = None

    def __post_init__(self) -> None:
        check_number("per_class", self.per_class, low=1, integer=True)

    @property
    def own_prior(self) -> Prior:
        """The prior. Raises `InputError` where there is none."""
        if self.prior is None:
            raise InputError("This source of samples needs a prior, and none was given. `smi.fit_prior` trains one.")
        return self.prior


@dataclass(frozen=True)
class Source:
    """A way to get samples.

    Attributes:
        label: For tables.
        make: Does it.
        needs_prior: Whether it looks at the prior.
        version: Raised by hand when the numbers change that it gives; an inversion has its own.
    """

    label: str
    make: Callable[[SourceInputs], Samples]
    needs_prior: bool = True
    version: int = 1


sources: Registry[Source] = Registry("source")
"""Sources by name."""


def make_samples(name: str, given: SourceInputs) -> Samples:
    """Samples of the source ``name``, which they carry as their own. Raises `InputError` for what is missing."""
    return replace(sources[name].make(given), source=name)


def pseudo_labelled(model: nn.Module, public: PublicImages, n: int, *, seed: int = 0) -> Samples:
    """``n`` public images (all where there are fewer) with the labels that the suspect model gives them."""
    chosen = torch.randperm(len(public), generator=stream(seed, "public"))[:n]
    return _labelled(model, public.images[chosen], "public")


def _labelled(model: nn.Module, images: Tensor, source: str) -> Samples:
    logits = predict(model, images)
    return Samples(images, logits.argmax(1), logits.shape[1], source)


def _total(given: SourceInputs) -> int:
    classes = predict(given.model, given.public.images[:1]).shape[1]
    return given.per_class * classes


def _clean(given: SourceInputs) -> Samples:
    if given.private is None:
        raise InputError("The control 'clean' needs the private training set, which only the evaluator has.")
    return clean_control(given.private, per_class=given.per_class, seed=given.seed)


def _public(given: SourceInputs) -> Samples:
    return pseudo_labelled(given.model, given.public, _total(given), seed=given.seed)


def _random(given: SourceInputs) -> Samples:
    images = random_images(given.own_prior, _total(given), stream(given.seed, "random"))
    return _labelled(given.model, images, "random")


def _inversion(label: str, method: Inversion, selection: Selection | None = None) -> Source:
    def make(given: SourceInputs) -> Samples:
        prior = given.own_prior
        return invert(given.model, prior, method, per_class=given.per_class, selection=selection, seed=given.seed)

    return Source(label, make, version=method.version)


sources.add("clean", Source("clean samples (control)", _clean, needs_prior=False))
sources.add("public", Source("public images, pseudo-labels", _public, needs_prior=False))
sources.add("random", Source("random generator samples, pseudo-labels", _random))
sources.add("pixel", _inversion("pixel inversion", Pixel()))
sources.add("deepinversion", _inversion("DeepInversion", DeepInversion()))
sources.add("latent", _inversion("latent inversion, no stability", Latent()))
# The ablations leave one side out of the search and of the selection alike.
sources.add("input", _inversion("stable input only", Stabilized(lambda_w=0.0), Selection(sigma_w=0.0)))
sources.add("parameter", _inversion("stable parameters only", Stabilized(lambda_x=0.0), Selection(sigma_x=0.0)))
sources.add("smi", _inversion("SMI, no clean data", Stabilized(), Selection()))
