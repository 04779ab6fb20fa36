"""One run, composed: the call a user makes, and the demo that also plays attacker and evaluator."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smi.attacks import Attack, BadNets, plant
from smi.defenses import Defense, Erasure, Repair
from smi.detection import detect
from smi.domains.base import Domain, PublicImages, Samples, check_public
from smi.evaluation import Comparison, Evaluator, Measurement, clean_control
from smi.inversion import Inversion, Latent, Stabilized, invert
from smi.inversion.selection import Selection, kernel_backend
from smi.models.classifiers import TrainConfig
from smi.priors.base import Prior, check_prior, random_images
from smi.runtime.checks import check_model
from smi.runtime.compute import circumstances
from smi.runtime.seeding import derive, stream
from smi.sources import pseudo_labelled

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


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the demo's table: what the samples were, which defense, and what the evaluator found."""

    source: str
    label: str
    defense: str
    result: Comparison
    repair: Repair


@dataclass(eq=False)
class Demo:
    """Everything a demo run found, for table, report and notebooks.

    Attributes:
        seed: Of the run.
        domain: Where the images are from.
        victim: The model with the backdoor.
        attack: What planted it.
        before: Rates of the victim.
        samples: SMI's.
        rows: In the order of the table, SMI under the source "smi".
        stages: Seconds by stage.
        settings: For the record.
    """

    seed: int
    domain: Domain
    victim: nn.Module
    attack: Attack
    before: Measurement
    samples: Samples
    rows: list[Row]
    stages: dict[str, float]
    settings: dict[str, Any]

    def row(self, source: str) -> Row:
        """The row of one source."""
        return next(row for row in self.rows if row.source == source)

    def summary(self) -> dict[str, Any]:
        """The record that `report.json` holds: rates in [0, 1], times in seconds."""
        smi = self.row("smi")
        return {
            "seed": self.seed,
            "n": len(self.samples),
            "before": {"acc": self.before.acc, "asr": self.before.asr},
            "after": smi.result.as_dict(),
            "controls": {row.source: row.result.as_dict() for row in self.rows if row.source != "smi"},
            "stages": self.stages,
            "settings": self.settings,
            "findings": {row.source: findings(row.repair) for row in self.rows},
            "kernel_backend": kernel_backend(self.victim, self.samples.images, self.samples.labels),
        } | circumstances(self.victim)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo runs with; the same for every seed."""

    train: TrainConfig = field(default_factory=TrainConfig)
    attack: Attack = field(default_factory=BadNets)
    rate: float = 0.1
    per_class: int = PER_CLASS
    inversion: Inversion = field(default_factory=Stabilized)
    latent: Inversion = field(default_factory=Latent)
    selection: Selection = field(default_factory=Selection)
    defense: Defense = field(default_factory=Erasure)


def run_demo(
    domain: Domain, prior: Prior, config: DemoConfig = DemoConfig(), *, seed: int = 0, device: str = "cpu"
) -> Demo:
    """Plant a backdoor, remove it without clean data, and compare with the controls.

    Attacker and evaluator use ``domain.private``; the defender is handed the victim, the prior and public images.

    Args:
        domain: Private images to attack and measure on, and public ones.
        prior: A generator of public images of that shape.
        config: Default: `DemoConfig`.
        seed: Of everything random.
        device: Where the victim is attacked and repaired; it is trained on the CPU.
    """
    clock = Clock()
    with clock("train"):
        victim, attack = plant(domain.private.train, config.attack, config.train, rate=config.rate, seed=seed)
    victim.to(device)
    evaluator = Evaluator(domain.private.test, attack)
    sources = _sources(domain, prior, victim, config, seed, clock)
    before, defense = evaluator.measure(victim), config.defense
    if isinstance(defense, Erasure) and defense.detection is None:  # the same for every row
        with clock("detect"):
            found = detect(victim, sources["smi"][1], domain.public, defense.detector, seed=seed)
        defense = replace(defense, detection=found)
    rows = []
    for source, (label, samples) in sources.items():
        with clock("repair" if source == "smi" else f"repair/{source}"):
            repair = defense.repair(victim, samples, domain.public, seed=seed)
        with clock("evaluate"):
            after = evaluator.measure(repair.model)
        rows.append(Row(source, label, repair.defense, Comparison(before, after), repair))
    settings = {"domain": domain.name, "prior": getattr(prior, "record", {}), **asdict(config)}
    settings["attack"] = attack.settings()
    return Demo(seed, domain, victim, attack, before, sources["smi"][1], rows, clock.seconds, settings)


def _sources(
    domain: Domain, prior: Prior, victim: nn.Module, config: DemoConfig, seed: int, clock: Clock
) -> dict[str, tuple[str, Samples]]:
    """The samples of every row, the same number each."""
    with clock("invert"):
        smi = invert(victim, prior, config.inversion, per_class=config.per_class, selection=config.selection, seed=seed)
    with clock("invert/latent"):
        latent = invert(victim, prior, config.latent, per_class=config.per_class, seed=seed)
    public = pseudo_labelled(victim, domain.public, len(smi), seed=seed)
    clean = clean_control(domain.private.train, per_class=config.per_class, seed=seed)
    return {
        "public": ("public images, pseudo-labels", public),
        "latent": ("latent inversion, no stability", latent),
        "smi": ("SMI, no clean data", smi),
        "clean": ("clean samples (control)", clean),
    }


def findings(repair: Repair) -> dict[str, Any]:
    """What a defense logged, as plain numbers for a record."""
    return {"defense": repair.defense, **repair.log}


class Clock:
    """Seconds by stage; a stage entered twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time what is inside the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + spent, 3)


def example_stamps(demo: Demo, count: int = 5) -> tuple[Tensor, Tensor]:
    """``count`` test images without and with the trigger, for pictures."""
    images = demo.domain.private.test.images[:count]
    return images, demo.attack.stamp(images)
