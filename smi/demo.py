"""The demo: attacker, defender and evaluator in one run, with the controls that the README's table has."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from smi.attacks import Attack, BadNets, plant
from smi.defenses import Defense, Erasure, Repair
from smi.detection import detect
from smi.domains.base import Domain, Samples
from smi.evaluation import Comparison, Evaluator, Measurement, clean_control
from smi.inversion import Inversion, Latent, Stabilized, invert
from smi.inversion.selection import Selection, kernel_backend
from smi.models.classifiers import TrainConfig
from smi.pipeline import PER_CLASS
from smi.priors.base import Prior
from smi.runtime.compute import circumstances
from smi.runtime.progress import Clock
from smi.sources import pseudo_labelled


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
            "findings": {row.source: row.repair.findings for row in self.rows},
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


def example_stamps(demo: Demo, count: int = 5) -> tuple[Tensor, Tensor]:
    """``count`` test images without and with the trigger, for pictures."""
    images = demo.domain.private.test.images[:count]
    return images, demo.attack.stamp(images)
