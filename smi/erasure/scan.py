"""Which classes are reached unusually easily, and against what that is seen.

Ease is reach by size: the share of other images that the smallest trigger found sends to a class, by how much of an
image that takes. Classes differ in it without any backdoor. How much, the suspect's own classes say: with e the
logarithm of ease,

    excess = (e − median e) / spread,

where the spread is that of the suspect's classes (a robust one, that a backdoor does not widen), or `Family.spread`
where they lie closer together than classes do in general. Of a class that is not reached (`REACHED`) it is known that
its ease is at most `REACHED` by the size that was tried, and it counts as that: there are models most of whose classes
no warp reaches, and one that is reached there stands out.

A backdoor may also send every class elsewhere (all-to-all). Then no class stands out; what is easy is to get
`ANYWHERE`. Without such a backdoor it is harder to send images of every class out of it by one trigger than to send
them all to the class that is easiest to reach, by `Family.anywhere`. So that is what it is seen against. And without
one the trigger moves each class along directions that natural images use: where these are erased the model no longer
knows what it knew (`Scan.kept`). A backdoor to one class is a way out of all the others, too, but to one place
(`Scan.sent`).

Many models have a class that takes whatever they do not know: white noise, patches or warps of no design send most of
the images that they move to it (`Scan.absorbing`). It is easy to reach by a found trigger, too, without a backdoor.

Of two or three classes the median may be the backdoor's own. There nothing can be said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smi.erasure.families import families
from smi.erasure.search import ANYWHERE, PARTS, REACHED, Found, Search, search
from smi.runtime.checks import device_of
from smi.runtime.compute import fast, predict
from smi.runtime.seeding import stream

SPREAD_ANYWHERE = 0.35  # of the log ease to get anywhere by that of the easiest class, without a backdoor
FEW = 4  # classes: of fewer, the median may be the backdoor's own
MOST = 0.5  # of the images that are moved, to one class: by random changes, it is the model's answer to the unknown
LEAST_EASE = 0.2  # of the median class's: below, an ease says no more
NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation


@dataclass(frozen=True, eq=False)
class Scan:
    """What a search found on the suspect.

    Attributes:
        found: Triggers, one `Found` a family, one trigger a target.
        drift: Of the images that random changes move to another class, the share that goes to each class
            ``[classes]``; None where that was not looked at.
        kept: Share of natural images, in [0, 1], that stay in their class where what sends images `ANYWHERE` is erased;
            None where that was not looked at.
        sent: Of the images that this trigger moves to another class, the largest share that goes to one class; None
            where that was not looked at.
    """

    found: list[Found]
    drift: Tensor | None = None
    kept: Tensor | None = None
    sent: Tensor | None = None

    @property
    def classes(self) -> list[int]:
        """Labels that were examined."""
        return [target for target in self.found[0].targets.tolist() if target != ANYWHERE]

    @property
    def conclusive(self) -> bool:
        """Whether there are enough classes to see one against the others."""
        return len(self.classes) >= FEW

    @property
    def absorbing(self) -> int | None:
        """The class to which random changes send most of the images that they move; None where there is none."""
        if self.drift is None or self.drift.max() <= MOST:
            return None
        return int(self.drift.argmax())

    def excess(self, again: Sequence[Found] | None = None) -> Tensor:
        """How unusual each class is in each family ``[families, T]``, in standard deviations of usual classes.

        -1 where a class is not reached, or there are too few to compare.

        Args:
            again: Triggers that were searched for some of these classes on another model, a repaired one. They are
                seen against the suspect's classes. Default: those on the suspect.
        """
        return torch.stack([self._excess(place, again) for place in range(len(self.found))])

    def _excess(self, place: int, again: Sequence[Found] | None) -> Tensor:
        one = _classes(self.found[place])
        other = one if again is None else _classes(again[place])
        if not self.conclusive:
            return torch.full((len(other.targets),), -1.0)
        median = _ease(one).median().clamp(min=1e-6)

        def above(found: Found) -> Tensor:
            return (_ease(found) / median).clamp(min=LEAST_EASE).log()

        spread = max(families[one.family].spread, NORMAL * above(one).abs().median().item())
        return torch.where(other.reach > REACHED, above(other) / spread, torch.full_like(other.size, -1.0))

    def excess_anywhere(self, again: Sequence[Found] | None = None) -> Tensor:
        """How unusual it is that one trigger sends images out of their class ``[families]``, as for `excess`.

        Minus infinity where it was not searched.
        """
        rows = torch.full((len(self.found),), -torch.inf)
        for place, one in enumerate(again or self.found):
            here = one.select(one.targets == ANYWHERE)
            if len(here.targets):
                easiest = _ease(_classes(self.found[place])).max().clamp(min=1e-6)
                ratio = (_ease(here)[0] / easiest).clamp(min=1e-6).log()
                excess = (ratio - families[one.family].anywhere) / SPREAD_ANYWHERE
                rows[place] = excess if self.conclusive and here.reach[0] > REACHED else -1.0
        return rows

    def strongest(self, target: int) -> tuple[Found, float]:
        """The trigger by whose family a class (or `ANYWHERE`) is the most unusual on the suspect, and the excess."""
        row = self.excess_anywhere() if target == ANYWHERE else self.excess()[:, self.classes.index(target)]
        return self.of([target])[int(row.argmax())], row.max().item()

    def strongest_of(self, classes: Sequence[int]) -> list[Found]:
        """The `strongest` trigger to each of these classes."""
        return [self.strongest(target)[0] for target in classes]

    def of(self, classes: Sequence[int]) -> list[Found]:
        """The triggers on the suspect to these classes."""
        return [one.select(torch.isin(one.targets, torch.tensor(list(classes)))) for one in self.found]

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the families' names, for a checkpoint; `restored` reads it."""
        parts = {f"{place}.{key}": getattr(one, key) for place, one in enumerate(self.found) for key in PARTS}
        others = {"drift": self.drift, "kept": self.kept, "sent": self.sent}
        return parts | {name: tensor for name, tensor in others.items() if tensor is not None}

    @classmethod
    def restored(cls, names: Sequence[str], tensors: Mapping[str, Tensor]) -> Scan:
        """What `tensors` gave, with the names of the families."""
        found = [Found(name, *(tensors[f"{place}.{key}"] for key in PARTS)) for place, name in enumerate(names)]
        return cls(found, tensors.get("drift"), tensors.get("kept"), tensors.get("sent"))

    def record(self) -> dict[str, Any]:
        """As plain values, for a report: by family, a number a class."""
        rows = zip(self.found, self.excess().tolist(), strict=True)
        return {
            "classes": self.classes,
            "absorbing": self.absorbing,
            "kept": None if self.kept is None else self.kept.item(),
            "sent": None if self.sent is None else self.sent.item(),
            "size": {one.family: _classes(one).size.tolist() for one in self.found},
            "reach": {one.family: _classes(one).reach.tolist() for one in self.found},
            "excess": {one.family: row for one, row in rows},
        }


def _classes(found: Found) -> Found:
    return found.select(found.targets != ANYWHERE)


def _ease(found: Found) -> Tensor:
    """Reach by size; of a class that is not reached, the most that it can be."""
    return found.reach.clamp(min=REACHED) / found.size.clamp(min=1e-6)


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


def drift(model: nn.Module, images: Tensor, labels: Tensor, classes: int, *, seed: int = 0) -> Tensor:
    """Where random changes lead: `Scan.drift`.

    Args:
        model: Images to logits.
        images: ``[N, C, H, W]`` in [0, 1]. Each is changed once by every family (`Family.change`).
        labels: What they are ``[N]``.
        classes: How many there are.
        seed: Of the changes.

    Returns:
        Shares ``[classes]`` with the sum 1, or zeros where nothing is moved.
    """
    rng = stream(seed, "drift")
    said = torch.stack([predict(model, families[name].change(images, rng)).argmax(1) for name in families])
    return _destinations(said, labels, classes)


@torch.no_grad()
def sent(model: nn.Module, images: Tensor, labels: Tensor, classes: int, one: Found) -> Tensor:
    """Where the trigger ``one`` leads: `Scan.sent`. The other arguments are those of `drift`."""
    device = device_of(model)
    said = [predict(model, one.stamp(part.to(device))[0]).argmax(1) for part in images.split(256)]
    return _destinations(torch.cat(said), labels, classes).max()


def _destinations(said: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Of the images that are called another class than their own, the share that goes to each ``[classes]``."""
    counts = torch.bincount(said[said != labels], minlength=classes).float()
    return counts / counts.sum().clamp(min=1)
