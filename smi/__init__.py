"""Stabilized model inversion: remove a backdoor from an image classifier without clean data."""

from smi import attacks, defenses
from smi.attacks import poison
from smi.classifiers import Classifier, TrainConfig, build_classifier, train_classifier
from smi.domains import Domain, PrivateSet, PublicImages, Samples, load_domain, load_public
from smi.errors import InputError
from smi.evaluation import Comparison, Evaluator, Measurement, clean_control
from smi.gan import PriorConfig, fit_prior
from smi.inversion import Latent, Pixel, Stabilized, invert
from smi.pipeline import Cleaned, DemoConfig, remove_backdoor, run_demo
from smi.priors import GeneratorPrior, Prior, load_prior, save_prior
from smi.stability import Selection, select_stable

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "Cleaned",
    "Comparison",
    "DemoConfig",
    "Domain",
    "Evaluator",
    "GeneratorPrior",
    "InputError",
    "Latent",
    "Measurement",
    "Pixel",
    "Prior",
    "PriorConfig",
    "PrivateSet",
    "PublicImages",
    "Samples",
    "Selection",
    "Stabilized",
    "TrainConfig",
    "attacks",
    "build_classifier",
    "clean_control",
    "defenses",
    "fit_prior",
    "invert",
    "load_domain",
    "load_prior",
    "load_public",
    "poison",
    "remove_backdoor",
    "run_demo",
    "save_prior",
    "select_stable",
    "train_classifier",
]
