"""Erasure: find triggers, erase their directions, tune a little; where nothing is unusual, do nothing.

A trigger moves the features, the input of the last linear layer, along few directions that natural images hardly use.
So: search the smallest trigger to every class in several families (`smi.erasure.search`); take the classes that are
reached unusually easily (`smi.erasure.scan`); take the directions of their triggers out of the last layer in closed
form (`smi.erasure.head`); train some steps on stamped images that keep their label (`smi.erasure.tune`); search again,
and go on while something is unusual.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from torch import Tensor, nn

from smi.checks import check_number
from smi.compute import frozen
from smi.defenses.base import Defense, Evidence, Repair, defenses
from smi.detection import Detector
from smi.domains.base import PublicImages, Samples
from smi.erasure.directions import directions
from smi.erasure.head import erase, features, head_of
from smi.erasure.scan import Scan, look
from smi.erasure.search import ANYWHERE, Found
from smi.erasure.tune import Tuning, tune
from smi.errors import InputError
from smi.seeding import stream
from smi.unfinished import current


@defenses.register("erasure")
@dataclass(frozen=True, kw_only=True)
class Erasure(Defense):
    """Find, erase, tune, look again.

    Attributes:
        detector: Which classes are treated: those that it takes for a sign.
        tuning: The steps after erasing.
        rounds: Of erasing and tuning, at most.
        targets: Classes to treat whatever is unusual; None to treat those that are.
    """

    detector: Detector = field(default_factory=Detector)
    tuning: Tuning = field(default_factory=Tuning)
    rounds: int = 2
    targets: tuple[int, ...] | None = None

    name = "erasure"

    def __post_init__(self) -> None:
        check_number("rounds", self.rounds, low=1, integer=True)

    def check_fits(self, model: nn.Module, images: Tensor) -> None:
        """The logits must be the output of a linear layer, see `head_of`."""
        head_of(model, images)

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, seed: int) -> Repair:
        unknown = [label for label in self.targets or () if label not in range(samples.num_classes)]
        if unknown:
            raise InputError(f"targets holds {unknown[0]}. Allowed: 0 to {samples.num_classes - 1}.")
        repaired, rng = copy.deepcopy(model).eval().requires_grad_(True), stream(seed, "erasure")
        head = head_of(repaired, samples.images[:2])
        detector = self.detector
        kept = current().once("scan", rng, lambda: detector.scan(model, samples, public, seed=seed).tensors())
        detection = detector.judge(Scan.restored(detector.search.families, kept))
        scan = detection.scan
        treated = detection.reached if self.targets is None else sorted(set(self.targets))
        found, left, curve = scan.of(treated), treated, []
        # At first all that leads there, later what is still unusual. A trigger to anywhere has a direction a class.
        erased = self._unusual(scan, found, treated) if treated == [ANYWHERE] else found
        for _ in range(self.rounds):
            if not left:
                break
            rows = directions(repaired, head, samples, erased)
            if len(rows):
                erase(head.layer, features(repaired, head, samples.images), rows)
            curve += tune(repaired, samples, public, found, self.tuning, rng)
            found = look(frozen(repaired), samples.images, samples.labels, treated, detector.search, seed=seed)
            erased = self._unusual(scan, found, treated)
            left = sorted({target for one in erased for target in one.targets.tolist()})
        evidence = Evidence(detection, treated, found if treated else [], left)
        log = {"loss": curve, "treated": treated, "left": left, "scan": detection.record()}
        if treated:
            log["excess_after"] = evidence.excess_after()
        return Repair(repaired, self.name, samples.source, self.settings(), log, evidence=evidence)

    def _unusual(self, scan: Scan, found: list[Found], treated: list[int]) -> list[Found]:
        """Those of the triggers on a repaired model that are still unusual."""
        excess = scan.excess_anywhere(found)[:, None] if treated == [ANYWHERE] else scan.excess(found)
        return [one.select(row > self.detector.unusual) for one, row in zip(found, excess, strict=True)]
