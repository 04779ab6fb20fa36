"""Erasure: find triggers, erase their directions, tune a little; where nothing is unusual, do nothing.

A trigger moves the features, the input of the last linear layer, along few directions that natural images hardly use.
So: search the smallest trigger to every class in several families (`smi.erasure.search`); take the classes that are
reached unusually easily (`smi.erasure.scan`); take the directions of their triggers out of the last layer in closed
form (`smi.erasure.head`); train some steps on stamped images that keep their label (`smi.erasure.tune`); search again,
and go on while something is unusual.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

import torch
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

STARTS = 4  # of a class that is still unusual after a round


@defenses.register("erasure")
@dataclass(frozen=True, kw_only=True)
class Erasure(Defense):
    """Find, erase, tune, look again.

    Attributes:
        detector: Which classes are treated: those that it takes for a sign.
        tuning: The steps after erasing.
        rounds: At most: the first erases one trigger a family and class and tunes; where something stays unusual, the
            second does so anew with several triggers, and further ones go on tuning with more.
        targets: Classes to treat whatever is unusual; None to treat those that are.
    """

    detector: Detector = field(default_factory=Detector)
    tuning: Tuning = field(default_factory=Tuning)
    rounds: int = 3
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
        detector, rng = self.detector, stream(seed, "erasure")
        kept = current().once("scan", rng, lambda: detector.scan(model, samples, public, seed=seed).tensors())
        detection = detector.judge(Scan.restored(detector.search.families, kept))
        scan = detection.scan
        treated = detection.reached if self.targets is None else sorted(set(self.targets))
        repaired, found, left = copy.deepcopy(model).eval().requires_grad_(True), scan.of(treated), treated
        shown: list[Found] = []
        curve: list[float] = []
        for number in range(self.rounds):
            if not left:
                break
            if number == 0:  # all that leads there; a trigger to anywhere has a direction a class, so not all of those
                shown = found
                _erase(repaired, samples, self._unusual_kinds(scan, found) if treated == [ANYWHERE] else found)
            elif number == 1:  # again from the suspect: to erase twice undoes what was tuned to cancel
                repaired = copy.deepcopy(model).eval().requires_grad_(True)
                several = self._several(model, samples, treated, seed + number)
                shown = self._unusual_kinds(scan, _joined(scan.of(treated), several))
                _erase(repaired, samples, shown)
            else:
                shown = _joined(shown, self._several(repaired, samples, treated, seed + number))
            curve += tune(repaired, samples, public, shown, self.tuning, rng)
            found = look(frozen(repaired), samples.images, samples.labels, treated, detector.search, seed=seed)
            unusual = self._unusual(scan, found, treated)
            left = sorted({target for one in unusual for target in one.targets.tolist()})
        evidence = Evidence(detection, treated, found if treated else [], left)
        rounds = len(curve) // self.tuning.steps
        log = {"loss": curve, "treated": treated, "rounds": rounds, "left": left, "scan": detection.record()}
        if treated:
            log["excess_after"] = evidence.excess_after()
        return Repair(repaired, self.name, samples.source, self.settings(), log, evidence=evidence)

    def _several(self, model: nn.Module, samples: Samples, treated: list[int], seed: int) -> list[Found]:
        """`STARTS` triggers a family of each class. Where the planted one moves the features far, what a single found
        one misses of its direction is still enough to fool."""
        config = replace(self.detector.search, restarts=1)
        return look(frozen(model), samples.images, samples.labels, treated * STARTS, config, seed=seed)

    def _unusual(self, scan: Scan, found: list[Found], treated: list[int]) -> list[Found]:
        """Those of the triggers on a repaired model that are still unusual."""
        excess = scan.excess_anywhere(found)[:, None] if treated == [ANYWHERE] else scan.excess(found)
        return [one.select(row > self.detector.unusual) for one, row in zip(found, excess, strict=True)]

    def _unusual_kinds(self, scan: Scan, found: list[Found]) -> list[Found]:
        """Those of the triggers whose family is unusual for their class on the suspect; all where no family is."""
        excess = dict(zip([*scan.classes, ANYWHERE], [*scan.excess().T, scan.excess_anywhere()], strict=True))
        unusual = {label: row > self.detector.unusual for label, row in excess.items()}
        unusual = {label: row if row.any() else ~row for label, row in unusual.items()}
        kept = [[bool(unusual[label][place]) for label in one.targets.tolist()] for place, one in enumerate(found)]
        return [one.select(torch.tensor(mask, dtype=torch.bool)) for one, mask in zip(found, kept, strict=True)]


def _erase(model: nn.Module, samples: Samples, found: list[Found]) -> None:
    """Take the directions of these triggers out of the model's head."""
    head = head_of(model, samples.images[:2])
    rows = directions(model, head, samples, found)
    if len(rows):
        erase(head.layer, features(model, head, samples.images), rows)


def _joined(some: list[Found], others: list[Found]) -> list[Found]:
    return [one.joined(other) for one, other in zip(some, others, strict=True)]
