"""The prior: a generator trained on public images, and its critic. Inversion searches the generator's latent space."""

from smi.priors.base import GAN, GeneratorPrior, Prior, load_generator, load_prior, sample_latents, save_prior
from smi.priors.gan import PriorConfig, fit_prior

__all__ = [
    "GAN",
    "GeneratorPrior",
    "Prior",
    "PriorConfig",
    "fit_prior",
    "load_generator",
    "load_prior",
    "sample_latents",
    "save_prior",
]
