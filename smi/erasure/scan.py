"""Which classes are reached unusually easily, and against what that is seen.

Ease is reach by size: the share of other images that the smallest trigger found sends to a class, by how much of an
image that takes. Classes differ in it without any backdoor. Two references say by how much: the other classes of the
same model, and the same class on a *student* of the suspect, which has learned the task and not the trigger. A student
is another model, so what is easy on it is only in part easy here; the less it has learned, the less it says, and where
it has learned little (`LEARNED`) it is not asked. With e the logarithm of ease on the suspect and e′ that on the
student, both less the median class's,

    u = e − share · agreement · e′,   excess = (u − median u) / spread,

where the spread is that of the suspect's own classes (a robust one, that a backdoor does not widen), or `Family.spread`
where they lie closer together than classes do in general.

A backdoor may also send every class elsewhere (all-to-all). Then no class stands out; what is easy is to get
`ANYWHERE`. That has no other classes to be seen against, nor has a class of two or three. There the student alone is
the reference, and where it has learned little, nothing can be said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smi.checks import device_of
from smi.compute import fast
from smi.erasure.families import families
from smi.erasure.search import ANYWHERE, PARTS, REACHED, Found, Search, search
from smi.seeding import stream

SHARE = 0.5
"""Of a class's log ease on a student that agrees fully, found again on its suspect: by regression over classes without
a backdoor."""

SPREAD_ALONE = 0.3  # of the log ease to get anywhere, between a model without a backdoor and its student
FEW = 4  # classes: of fewer, the median may be the backdoor's own
LEARNED = 0.5  # agreement from which a student is a reference
LEAST_EASE = 0.2  # of the median class's: below, an ease says no more
LEAST_OF_STUDENT = 0.5  # the same on a student, where a search may fail by chance
NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation


@dataclass(frozen=True, eq=False)
class Scan:
    """What a search found on the suspect, beside what it found on a student of it.

    Attributes:
        found: Triggers on the suspect, one `Found` a family, one trigger a target.
        reference: The same on a student; None for no student.
        agreement: How far the student agrees with the suspect beyond chance, in [0, 1].
    """

    found: list[Found]
    reference: list[Found] | None = None
    agreement: float = 1.0

    @property
    def classes(self) -> list[int]:
        """Labels that were examined."""
        return [target for target in self.found[0].targets.tolist() if target != ANYWHERE]

    @property
    def conclusive(self) -> bool:
        """Whether there is anything to see the classes against."""
        return len(self.classes) >= FEW or self.reference is not None

    def excess(self, again: Sequence[Found] | None = None) -> Tensor:
        """How unusual each class is in each family ``[families, T]``, in standard deviations of usual classes.

        Args:
            again: Triggers that were searched for some of these classes on another model, a repaired one. They are
                seen against the suspect's classes and the same student. Default: those on the suspect.
        """
        return torch.stack([self._excess(place, again) for place in range(len(self.found))])

    def _excess(self, place: int, again: Sequence[Found] | None) -> Tensor:
        one = _classes(self.found[place])
        if len(one.targets) < FEW:
            return self._excess_alone(place, one if again is None else _classes(again[place]))
        median = _ease(one).median().clamp(min=1e-6)
        natural = torch.zeros(len(one.targets))
        if self.reference is not None:
            student = _ease(_classes(self.reference[place]))
            student = (student / student.median().clamp(min=1e-6)).clamp(min=LEAST_OF_STUDENT).log()
            natural = SHARE * self.agreement * student
        usual = (_ease(one) / median).clamp(min=LEAST_EASE).log() - natural
        centre, seen = usual.median(), one.reach > REACHED
        spread = families[one.family].spread
        if seen.sum() > 2:
            spread = max(spread, NORMAL * (usual - centre)[seen].abs().median().item())
        other = one if again is None else _classes(again[place])
        rows = [one.targets.tolist().index(target) for target in other.targets.tolist()]
        excess = ((_ease(other) / median).clamp(min=LEAST_EASE).log() - natural[rows] - centre) / spread
        return torch.where(other.reach > REACHED, excess, torch.full_like(excess, -1.0))

    def excess_anywhere(self, again: Sequence[Found] | None = None) -> Tensor:
        """How unusual it is that one trigger sends images out of their class ``[families]``, as for `excess`.

        Minus infinity where it was not searched or there is no student.
        """
        rows = torch.full((len(self.found),), -torch.inf)
        for place, one in enumerate(again or self.found):
            here = one.select(one.targets == ANYWHERE)
            if self.reference is not None and len(here.targets):
                rows[place] = self._excess_alone(place, here)[0]
        return rows

    def _excess_alone(self, place: int, one: Found) -> Tensor:
        """Of these targets, against the student and no other class; -1 where one is not reached or there is none."""
        unreached = torch.full((len(one.targets),), -1.0)
        if self.reference is None:
            return unreached
        student = self.reference[place]
        rows = [student.targets.tolist().index(target) for target in one.targets.tolist()]
        excess = (_ease(one) / _ease(student)[rows].clamp(min=1e-6)).log() / SPREAD_ALONE
        return torch.where(one.reach > REACHED, excess, unreached)

    def strongest(self, target: int) -> tuple[int, float]:
        """In which family a class (or `ANYWHERE`) is the most unusual on the suspect, by its place, and the excess."""
        row = self.excess_anywhere() if target == ANYWHERE else self.excess()[:, self.classes.index(target)]
        return int(row.argmax()), row.max().item()

    def of(self, classes: Sequence[int]) -> list[Found]:
        """The triggers on the suspect to these classes."""
        return [one.select(torch.isin(one.targets, torch.tensor(list(classes)))) for one in self.found]

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the families' names, for a checkpoint; `restored` reads it."""
        said = {"agreement": torch.tensor(self.agreement)}
        for name, triggers in (("found", self.found), ("reference", self.reference or [])):
            for place, one in enumerate(triggers):
                said |= {f"{name}.{place}.{key}": getattr(one, key) for key in PARTS}
        return said

    @classmethod
    def restored(cls, names: Sequence[str], tensors: Mapping[str, Tensor]) -> Scan:
        """What `tensors` gave, with the names of the families."""

        def triggers(name: str) -> list[Found]:
            return [Found(one, *(tensors[f"{name}.{i}.{key}"] for key in PARTS)) for i, one in enumerate(names)]

        reference = triggers("reference") if "reference.0.size" in tensors else None
        return cls(triggers("found"), reference, tensors["agreement"].item())

    def record(self) -> dict[str, Any]:
        """As plain values, for a report: by family, a number a class."""
        said: dict[str, Any] = {"classes": self.classes, "agreement": self.agreement}
        for name, triggers in (("suspect", self.found), ("student", self.reference or [])):
            said[name] = {
                one.family: {"size": _classes(one).size.tolist(), "reach": _classes(one).reach.tolist()}
                for one in triggers
            }
        rows = zip(self.found, self.excess().tolist(), strict=True)
        return said | {"excess": {one.family: row for one, row in rows}}


def _classes(found: Found) -> Found:
    return found.select(found.targets != ANYWHERE)


def _ease(found: Found) -> Tensor:
    return found.reach / found.size.clamp(min=1e-6)


def look(
    model: nn.Module, images: Tensor, labels: Tensor, classes: Sequence[int], config: Search, *, seed: int = 0
) -> list[Found]:
    """A `search` on a frozen model, with draws that depend on the seed alone: what two models give can be compared.

    Args:
        model: Images to logits, frozen.
        images: ``[N, C, H, W]`` in [0, 1].
        labels: What they are ``[N]``.
        classes: Targets.
        config: See `Search`.
        seed: Of starts and batches.
    """
    with fast(model) as run:
        return search(run, images.to(device_of(model)), labels, classes, config, stream(seed, "search"))
