"""Erasure: find triggers, erase their directions, and tune against those and against changes of no design.

A trigger moves the features, the input of the last linear layer, along few directions that natural images hardly use.
So: search the smallest trigger to every class in several families (`smi.erasure.search`), on public images where there
are any (`smi.erasure.natural`); take the classes that are reached the most easily (`smi.erasure.scan`), where the sign
is weak if natural images hardly notice; take the direction of the trigger by which a class is the most unusual out of
the last layer in closed form (`smi.erasure.head`), where the trigger is gone with it; train the model to keep its
answers under the triggers of all families and under random changes (`smi.erasure.tune`), whether anything was found or
not, for not every backdoor is; search again, and go on tuning while something is unusual.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from smi.defenses.base import Defense, Evidence, Repair, defenses
from smi.detection import Detection, Detector
from smi.domains.base import PublicImages, Samples
from smi.erasure.directions import erase_found, held_without, kept_without
from smi.erasure.head import head_of
from smi.erasure.natural import joined, natural_images, spread_of
from smi.erasure.scan import Scan, look
from smi.erasure.search import ANYWHERE, Found
from smi.erasure.tune import Tuning, tune
from smi.errors import InputError
from smi.runtime.checks import check_number
from smi.runtime.compute import frozen, unfrozen
from smi.runtime.job import Job
from smi.runtime.unfinished import Tensors


@defenses.register("erasure")
@dataclass(frozen=True, kw_only=True)
class Erasure(Defense):
    """Find, erase, tune, look again.

    Attributes:
        detector: How classes are searched and compared.
        least: Excess, in standard deviations, from which a class is treated. Less than what the detector takes for a
            sign: to miss a backdoor costs more than to erase what is natural, unless that costs much
            (`Detector.kept`).
        held: Share of its reach that a trigger may keep without its direction, for the direction to be erased.
        tuning: The steps after erasing.
        rounds: At most. The first erases and tunes. Where something stays unusual, the next go on tuning, with the
            triggers that were found on the repaired model beside the others.
        targets: Classes to treat whatever is unusual; None to treat those that are.
        detection: What `smi.detect` found on this model with the same public images, not to search it again; None to
            search.
    """

    detector: Detector = field(default_factory=Detector)
    least: float = 1.5
    held: float = 0.25
    tuning: Tuning = field(default_factory=Tuning)
    rounds: int = 2
    targets: tuple[int, ...] | None = None
    detection: Detection | None = None

    name = "erasure"
    version = 3

    def __post_init__(self) -> None:
        check_number("least", self.least, low=0)
        check_number("held", self.held, low=0)
        check_number("rounds", self.rounds, low=1, integer=True)

    def settings(self) -> dict[str, Any]:
        """The configuration, for the record, without what was found."""
        found = {"defense": self.name} | asdict(replace(self, detection=None))
        del found["detection"]
        return found

    def check_fits(self, model: nn.Module, images: Tensor) -> None:
        """The logits must be the output of a linear layer, see `head_of`."""
        head_of(model, images)

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, job: Job) -> Repair:
        unknown = [label for label in self.targets or () if label not in range(samples.num_classes)]
        if unknown:
            raise InputError(f"targets holds {unknown[0]}. Allowed: 0 to {samples.num_classes - 1}.")
        natural = natural_images(model, samples, public, seed=job.seed)
        both, spread = joined(samples, natural), spread_of(samples, public)
        detection = self._detection(model, samples.num_classes, natural, spread, job)
        treated = self._treated(model, natural, spread, detection)
        repaired, rng = unfrozen(model), job.rng("erasure")
        worth = self._worth_erasing(model, natural, spread, detection.scan.strongest_of(treated))
        erase_found(repaired, both, spread, worth)
        unerased = tuple(sorted(set(treated).difference(*(one.targets.tolist() for one in worth))))
        shown = detection.scan.of(treated)  # of every family: to tune against one costs little, to erase one much
        curve, left, found = list[float](), treated, list[Found]()
        for number in range(1, self.rounds + 1):
            curve += tune(repaired, samples, public, shown, self.tuning, rng, job, name=f"tuning {number}")
            if not left:
                break
            found = self._search(repaired, natural, treated, number, job)
            left = self._left(detection, found, treated)
            if not left:
                break
            shown = [*shown, *found]  # to erase again would undo what was tuned to cancel
        evidence = Evidence(detection, treated, found, left, asked=self.targets is not None, unerased=unerased)
        rounds = len(curve) // self.tuning.steps
        log = {
            "loss": curve,
            "treated": treated,
            "unerased": list(unerased),
            "rounds": rounds,
            "left": left,
            "scan": detection.record(),
        }
        if treated:
            log["excess_after"] = evidence.excess_after()
        return Repair(repaired, self.name, samples.source, self.settings(), log, evidence=evidence)

    def _detection(self, model: nn.Module, classes: int, natural: Samples, spread: Tensor, job: Job) -> Detection:
        """What was given, or what a search finds."""
        if self.detection is None:
            scanned = job.unfinished.once(
                "scan", lambda: self.detector.scan(model, natural, spread, seed=job.seed).tensors()
            )
            return self.detector.judge(Scan.restored(self.detector.search.families, scanned))
        if self.detection.scan.classes != list(range(classes)):
            raise InputError(
                f"detection is of {len(self.detection.scan.classes)} classes, the samples of {classes}. "
                "Give what smi.detect found on this model."
            )
        return self.detection

    def _treated(self, model: nn.Module, natural: Samples, spread: Tensor, detection: Detection) -> list[int]:
        """The classes asked for; else the signs, and of the classes that are less those that cost nothing.

        To erase a class costs nothing where natural images keep their class without the directions of all of them. The
        most unusual class is tried first.
        """
        if self.targets is not None:
            return sorted(set(self.targets))
        scan, free = detection.scan, list[int]()
        candidates = self.detector.candidates(scan, self.least)
        for label in sorted(set(candidates) - set(detection.reached), key=lambda label: -scan.strongest(label)[1]):
            share = kept_without(model, natural, spread, scan.strongest_of([*free, label]))
            if share is not None and share > self.detector.kept:
                free.append(label)
        return sorted({*detection.reached, *free})

    def _search(self, model: nn.Module, natural: Samples, treated: list[int], number: int, job: Job) -> list[Found]:
        """Triggers to the treated classes on the repaired model, after the round of this number."""
        config, seed = self.detector.search, job.seed + number

        def searched() -> Tensors:
            return Scan(look(frozen(model), natural.images, natural.labels, treated, config, seed=seed)).tensors()

        return Scan.restored(config.families, job.unfinished.once(f"search {number}", searched)).found

    def _worth_erasing(self, model: nn.Module, natural: Samples, spread: Tensor, found: list[Found]) -> list[Found]:
        """Those of the triggers that lose most of their reach with their direction; the others are tuned against."""
        return [one.select(held_without(model, natural, spread, one) <= self.held) for one in found]

    @staticmethod
    def _left(detection: Detection, found: list[Found], treated: list[int]) -> list[int]:
        """Those of the treated classes that the triggers on a repaired model reach unusually easily."""
        scan = detection.scan
        excess = scan.excess_anywhere(found)[:, None] if treated == [ANYWHERE] else scan.excess(found)
        pairs = zip(treated, excess.amax(0).tolist(), strict=True)
        return [label for label, value in pairs if value > detection.limit_of(label)]
