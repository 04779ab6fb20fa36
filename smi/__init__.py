"""Stabilized model inversion: remove a backdoor from an image classifier without clean data.

The public names load when they are first asked for: `import smi` is instant, and the command line can set the
environment before torch is there.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smi import attacks as attacks, defenses as defenses
    from smi.attacks import plant as plant, poison as poison
    from smi.demo import DemoConfig as DemoConfig, run_demo as run_demo
    from smi.detection import detect as detect
    from smi.domains import (
        Domain as Domain,
        PrivateSet as PrivateSet,
        PublicImages as PublicImages,
        Samples as Samples,
        load_domain as load_domain,
        load_public as load_public,
    )
    from smi.errors import InputError as InputError
    from smi.evaluation import (
        Comparison as Comparison,
        Evaluator as Evaluator,
        Measurement as Measurement,
        clean_control as clean_control,
    )
    from smi.inversion import Latent as Latent, Pixel as Pixel, Stabilized as Stabilized, invert as invert
    from smi.inversion.selection import Selection as Selection, select_stable as select_stable
    from smi.models.classifiers import (
        Classifier as Classifier,
        TrainConfig as TrainConfig,
        build_classifier as build_classifier,
        train_classifier as train_classifier,
    )
    from smi.models.store import load_classifier as load_classifier, save_classifier as save_classifier
    from smi.models.suspects import load_suspect as load_suspect
    from smi.pipeline import Cleaned as Cleaned, remove_backdoor as remove_backdoor
    from smi.priors.base import (
        GeneratorPrior as GeneratorPrior,
        Prior as Prior,
        load_generator as load_generator,
        load_prior as load_prior,
        save_prior as save_prior,
    )
    from smi.priors.gan import PriorConfig as PriorConfig, fit_prior as fit_prior
    from smi.runtime.threads import choose_threads as choose_threads, use_threads as use_threads

__version__ = "0.1.0"

_HOMES = {
    "smi": "attacks defenses",
    "smi.attacks": "plant poison",
    "smi.models.classifiers": "Classifier TrainConfig build_classifier train_classifier",
    "smi.detection": "detect",
    "smi.domains": "Domain PrivateSet PublicImages Samples load_domain load_public",
    "smi.errors": "InputError",
    "smi.evaluation": "Comparison Evaluator Measurement clean_control",
    "smi.priors.gan": "PriorConfig fit_prior",
    "smi.inversion": "Latent Pixel Stabilized invert",
    "smi.models.store": "load_classifier save_classifier",
    "smi.demo": "DemoConfig run_demo",
    "smi.pipeline": "Cleaned remove_backdoor",
    "smi.priors.base": "GeneratorPrior Prior load_generator load_prior save_prior",
    "smi.inversion.selection": "Selection select_stable",
    "smi.models.suspects": "load_suspect",
    "smi.runtime.threads": "choose_threads use_threads",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME)

_MOVED = {
    name: f"smi.{package}.{name}"
    for package, names in {
        "runtime": "checks compute files job memory progress seeding threads unfinished",
        "domains": "arrays augment",
        "models": "classifiers suspects own_code checkpoints",
        "priors": "gan",
        "report": "sections page",
        "cli": "options",
        "tutorial": "explorers exercises lab",
        "dev": "notebooks",
    }.items()
    for name in names.split()
}
_MOVED |= {
    "interrupts": "smi.runtime.signals",
    "stability": "smi.inversion.selection",
    "figures": "smi.plotting.report",
    "analysis.figures": "smi.plotting.analysis",
    "study.plot": "smi.plotting.study",
    "attacks.gallery": "smi.plotting.attacks",
    "explorers.pictures": "smi.plotting.pictures",
    "cli_study": "smi.cli.study",
    "reference": "smi.dev.site",
    "rebuild": "smi.dev.assets",
}


class _Moved:
    """Says where a module is now that is imported by its former name; asked for what nothing else finds.

    As `smi_kernels.moved`, which would load torch.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.startswith("smi.") and name[4:] in _MOVED:
            raise ModuleNotFoundError(f"{name} has moved. It is now {_MOVED[name[4:]]}.")


sys.meta_path.append(_Moved)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'smi' has no attribute {name!r}")
    home = _HOME[name]
    value = import_module(f"smi.{name}") if home == "smi" else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
