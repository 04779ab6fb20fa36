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

import torch
from torch import Tensor, nn

from smi.checks import check_number
from smi.compute import frozen, predict
from smi.defenses.base import Defense, Repair, defenses
from smi.domains.base import PublicImages, Samples
from smi.erasure.directions import directions
from smi.erasure.head import erase, features, head_of
from smi.erasure.scan import LEARNED, Evidence, Scan, look
from smi.erasure.search import ANYWHERE, Found, Search
from smi.erasure.student import Draw, Lessons, teach
from smi.erasure.tune import Tuning, tune
from smi.errors import InputError
from smi.seeding import stream
from smi.unfinished import current

TAUGHT = 0.7  # of the samples are shown to the student; on the others one sees what it has learned


@defenses.register("erasure")
@dataclass(frozen=True, kw_only=True)
class Erasure(Defense):
    """Find, erase, tune, look again.

    Attributes:
        search: How triggers are searched.
        lessons: How the student is taught that tells what is easy by nature.
        tuning: The steps after erasing.
        rounds: Of erasing and tuning, at most.
        unusual: Excess, in standard deviations (see `smi.erasure.scan`), from which the most unusual class is treated.
        others: The same for further classes: more, since most backdoors have one target, and to erase what is natural
            costs accuracy.
        targets: Classes to treat whatever is unusual; None to treat those that are.
    """

    search: Search = field(default_factory=Search)
    lessons: Lessons = field(default_factory=Lessons)
    tuning: Tuning = field(default_factory=Tuning)
    rounds: int = 2
    unusual: float = 2.2
    others: float = 3.0
    targets: tuple[int, ...] | None = None

    name = "erasure"

    def __post_init__(self) -> None:
        check_number("rounds", self.rounds, low=1, integer=True)
        check_number("unusual", self.unusual, low=0)
        check_number("others", self.others, low=0)

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, seed: int) -> Repair:
        repaired, rng = copy.deepcopy(model).eval().requires_grad_(True), stream(seed, "erasure")
        head = head_of(repaired, samples.images[:2])  # raises before any work where there is none
        kept = current().once("scan", rng, lambda: self.scan(model, samples, public, seed=seed).tensors())
        scan = Scan.restored(self.search.families, kept)
        treated = self._treated(scan)
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
            found = look(frozen(repaired), samples.images, samples.labels, treated, self.search, seed=seed)
            erased = self._unusual(scan, found, treated)
            left = sorted({target for one in erased for target in one.targets.tolist()})
        evidence = Evidence(scan, treated, found if treated else [], left, self.unusual, self.others)
        log = {"loss": curve, "treated": treated, "left": left, "scan": scan.record()}
        if treated:
            log["excess_after"] = evidence.excess_after()
        return Repair(repaired, self.name, samples.source, self.settings(), log, evidence=evidence)

    def scan(self, model: nn.Module, samples: Samples, public: PublicImages | None = None, *, seed: int = 0) -> Scan:
        """The search on ``model``, and on a student of it where that has learned enough to compare with."""
        suspect, rng = frozen(model), stream(seed, "student")
        order = torch.randperm(len(samples), generator=rng)
        shown, others = order.tensor_split([round(TAUGHT * len(order))])
        student = teach(suspect, _pictures(samples.images[shown], public, rng), self.lessons, seed=seed)
        said = [predict(one, samples.images[others]).argmax(1) for one in (suspect, student)]
        chance = 1 / samples.num_classes
        agreement = max(0.0, ((said[0] == said[1]).float().mean().item() - chance) / (1 - chance))
        classes = [*range(samples.num_classes), ANYWHERE]

        def looked(one: nn.Module) -> list[Found]:
            return look(one, samples.images, samples.labels, classes, self.search, seed=seed)

        return Scan(looked(suspect), looked(student) if agreement >= LEARNED else None, agreement)

    def _treated(self, scan: Scan) -> list[int]:
        """Unusual classes, or `ANYWHERE` instead, where that is more unusual than any class."""
        if self.targets is not None:
            unknown = [label for label in self.targets if label not in scan.classes]
            if unknown:
                raise InputError(f"targets holds {unknown[0]}. Allowed: 0 to {max(scan.classes)}.")
            return sorted(set(self.targets))
        excess = scan.excess().amax(0)
        most = excess.max().item()
        if scan.excess_anywhere().max() > max(self.unusual, most):
            return [ANYWHERE]
        limits = [self.unusual if value == most else max(self.unusual, self.others) for value in excess.tolist()]
        rows = zip(scan.classes, excess.tolist(), limits, strict=True)
        return [label for label, value, limit in rows if value > limit]

    def _unusual(self, scan: Scan, found: list[Found], treated: list[int]) -> list[Found]:
        """Those of the triggers on a repaired model that are still unusual."""
        excess = scan.excess_anywhere(found)[:, None] if treated == [ANYWHERE] else scan.excess(found)
        return [one.select(row > self.unusual) for one, row in zip(found, excess, strict=True)]


def _pictures(images: Tensor, public: PublicImages | None, rng: torch.Generator) -> Draw:
    """Draws images, half of them public where there are any."""

    def draw(count: int) -> Tensor:
        sources = [images] if public is None else [images, public.images]
        return torch.cat([part[torch.randint(len(part), (count // len(sources),), generator=rng)] for part in sources])

    return draw
