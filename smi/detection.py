"""Does a suspect model carry a backdoor? What a defender can say without clean data.

To every class the smallest trigger is searched in several families (`smi.erasure.search`), and compared with what the
other classes take (`smi.erasure.scan`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from smi.domains.base import PublicImages, Samples, check_public, check_samples
from smi.erasure.directions import kept_without
from smi.erasure.natural import natural_images, spread_of
from smi.erasure.scan import MOST, Scan, drift, look, sent
from smi.erasure.search import ANYWHERE, Search
from smi.runtime.checks import check_model, check_number
from smi.runtime.compute import fingerprint_of, frozen
from smi.runtime.files import fingerprint
from smi.runtime.precision import asked_precision
from smi.runtime.unfinished import Unfinished

NEAR = 0.7  # of the largest excess: a class as unusual as that cannot be told from the most unusual one


@dataclass(frozen=True, kw_only=True)
class Detector:
    """How a backdoor is looked for.

    Attributes:
        search: How triggers are searched.
        unusual: Excess, in standard deviations (see `smi.erasure.scan`), from which the most unusual class is a sign.
        others: The same for further classes that are not `NEAR` the most unusual one: more, since most backdoors have
            one target.
        absorbing: The same for the class that takes whatever the model does not know (`Scan.absorbing`).
        anywhere: The same for `ANYWHERE`.
        kept: Share of natural images that have to stay in their class where `ANYWHERE` is erased, or a class that is
            less than a sign: those directions are hardly used without a backdoor's trigger.
    """

    search: Search = field(default_factory=Search)
    unusual: float = 2.6
    others: float = 4.0
    absorbing: float = 6.5
    anywhere: float = 2.0
    kept: float = 0.96

    def __post_init__(self) -> None:
        check_number("unusual", self.unusual, low=0)
        check_number("others", self.others, low=0)
        check_number("absorbing", self.absorbing, low=0)
        check_number("anywhere", self.anywhere, low=0)
        check_number("kept", self.kept, low=0, high=1)

    def scan(self, model: nn.Module, shown: Samples, spread: Tensor, *, seed: int = 0) -> Scan:
        """The search on ``model``, for every class and `ANYWHERE`.

        Args:
            model: The suspect, `frozen`.
            shown: Images that triggers are searched on, and their labels.
            spread: Images ``[N, C, H, W]`` whose features say how natural ones spread.
            seed: Of the search.
        """
        targets = [*range(shown.num_classes), ANYWHERE]
        found = look(model, shown.images, shown.labels, targets, self.search, seed=seed)
        scan = Scan(found, drift(model, shown.images, shown.labels, shown.num_classes, seed=seed))
        one, excess = scan.strongest(ANYWHERE)
        if excess <= self.anywhere:
            return scan
        cost = kept_without(model, shown, spread, [one])
        return replace(scan, kept=cost, sent=sent(model, shown.images, shown.labels, shown.num_classes, one))

    def judge(self, scan: Scan) -> Detection:
        """Which classes are signs: the most unusual one and clear further ones, or `ANYWHERE` where that is unusual."""
        reached = self._stand_out(scan, self.unusual, scan.excess().amax(0).max().item())
        return Detection(scan, reached, self.unusual, self.others, self.absorbing, self.anywhere)

    def candidates(self, scan: Scan, limit: float) -> list[int]:
        """The same with another limit for the most unusual class, and without regard to a class that absorbs."""
        return self._stand_out(scan, limit, self._excess(scan).max().item())

    def _stand_out(self, scan: Scan, limit: float, top: float) -> list[int]:
        """The most unusual class, if its excess is ``top``, and others by that; or `ANYWHERE`."""
        if self._anywhere(scan):
            return [ANYWHERE]
        further = max(limit, min(self.others, NEAR * top))
        pairs = zip(scan.classes, self._excess(scan).tolist(), strict=True)
        return [label for label, value in pairs if value > (limit if value == top else further)]

    def _anywhere(self, scan: Scan) -> bool:
        """Whether it is easy to send images to many other classes than theirs, along directions that only that uses."""
        alone = scan.kept is None or scan.kept > self.kept
        many = scan.sent is None or scan.sent <= MOST
        return bool(scan.excess_anywhere().max() > self.anywhere and alone and many)

    def _excess(self, scan: Scan) -> Tensor:
        """Of each class ``[classes]``, in any family; none for one that absorbs, up to its own limit."""
        excess = scan.excess().amax(0)
        if scan.absorbing is not None:
            place = scan.classes.index(scan.absorbing)
            excess[place] = excess[place] if excess[place] > self.absorbing else -1.0
        return excess


@dataclass(frozen=True, eq=False)
class Detection:
    """What `detect` found.

    Attributes:
        scan: The triggers, and how unusual each class is.
        reached: Classes that are reached unusually easily; `smi.erasure.search.ANYWHERE` alone where what is unusual is
            how easily images leave their class (an all-to-all backdoor). None where nothing is unusual, and where
            nothing can be said (`Scan.conclusive`).
        limit: Excess from which the most unusual class counts as that.
        others: The same for further classes.
        absorbing: The same for the class that takes whatever the model does not know (`Scan.absorbing`).
        anywhere: The same for `ANYWHERE`.
    """

    scan: Scan
    reached: list[int]
    limit: float
    others: float
    absorbing: float = math.inf
    anywhere: float = math.inf

    def limit_of(self, label: int) -> float:
        """Excess from which a class, the most unusual one, counts as a sign, or `ANYWHERE`."""
        if label == ANYWHERE:
            return self.anywhere
        return self.absorbing if label == self.scan.absorbing else self.limit

    @property
    def conclusive(self) -> bool:
        """Whether there is anything to see the classes against."""
        return self.scan.conclusive

    def __repr__(self) -> str:
        return f"Detection(reached={self.reached}, conclusive={self.conclusive})"

    def record(self) -> dict[str, Any]:
        """As plain values, for `report.json`."""
        limits = {"limit": self.limit, "others": self.others, "absorbing_limit": self.absorbing}
        limits["anywhere_limit"] = self.anywhere
        return self.scan.record() | {"reached": self.reached} | limits


def detect(
    model: nn.Module,
    samples: Samples,
    public: PublicImages | None = None,
    config: Detector | None = None,
    *,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Detection:
    """Look for classes that are reached unusually easily.

    Args:
        model: Images ``[N, C, H, W]`` in [0, 1] to logits; left as it is.
        samples: Labelled images of every class: reconstructions (`smi.invert`), or clean ones where there are any.
        public: Unlabelled public images of that shape; where there are any, triggers are searched on those (see
            `smi.erasure.natural`).
        config: Default: `Detector`.
        seed: Of the search.
        checkpoint: A file for the result, which is not found twice.

    Raises:
        InputError: Where the pieces do not fit together.

    >>> import smi, smi.detection
    >>> suspect, digits = smi.load_classifier("digits-badnets"), smi.load_domain("digits")
    >>> some = smi.clean_control(digits.private.train, per_class=10)
    >>> search = smi.erasure.Search(families=("additive",), steps=20)  # quick, for this example
    >>> detect(suspect, some, config=smi.detection.Detector(search=search))
    Detection(reached=[0], conclusive=True)
    """
    check_samples(samples, "detect")
    check_model(model, samples.images, samples.num_classes)
    check_public(public, samples.images.shape[1:])
    config = config or Detector()
    record: dict[str, Any] = asdict(config) | {"seed": seed, "precision": asked_precision()}
    if checkpoint is not None:
        record |= {"model": fingerprint_of(model), "public": None if public is None else fingerprint(public.images)}
        record |= {"images": fingerprint(samples.images), "labels": fingerprint(samples.labels)}
    unfinished, suspect = Unfinished(checkpoint, "detection", record), frozen(model)
    shown, spread = natural_images(suspect, samples, public, seed=seed), spread_of(samples, public)
    found = unfinished.once("scan", lambda: config.scan(suspect, shown, spread, seed=seed).tensors())
    return config.judge(Scan.restored(config.search.families, found))
