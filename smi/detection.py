"""Does a suspect model carry a backdoor? What a defender can say without clean data.

To every class the smallest trigger is searched in several families (`smi.erasure.search`), and compared with what other
classes take and with what the class takes on a student of the suspect (`smi.erasure.scan`, `smi.erasure.student`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smi.checks import check_model, check_number
from smi.compute import asked_precision, fingerprint_of, frozen, predict
from smi.domains.base import PublicImages, Samples, check_public, check_samples
from smi.erasure.scan import FEW, LEARNED, Scan, look
from smi.erasure.search import ANYWHERE, Found, Search
from smi.erasure.student import Draw, Lessons, teach
from smi.files import fingerprint
from smi.seeding import stream
from smi.unfinished import Unfinished

PROMISING = LEARNED / 2  # agreement after a quarter of the lessons, from which the others are worth while
TAUGHT = 0.7  # of the samples are shown to the student; on the others one sees what it has learned


@dataclass(frozen=True, kw_only=True)
class Detector:
    """How a backdoor is looked for.

    Attributes:
        search: How triggers are searched.
        lessons: How the student is taught that tells what is easy by nature.
        unusual: Excess, in standard deviations (see `smi.erasure.scan`), from which the most unusual class is a sign.
        others: The same for further classes: more, since most backdoors have one target.
    """

    search: Search = field(default_factory=Search)
    lessons: Lessons = field(default_factory=Lessons)
    unusual: float = 2.2
    others: float = 3.0

    def __post_init__(self) -> None:
        check_number("unusual", self.unusual, low=0)
        check_number("others", self.others, low=0)

    def scan(self, model: nn.Module, samples: Samples, public: PublicImages | None = None, *, seed: int = 0) -> Scan:
        """The search on ``model``, and on a student of it where that has learned enough to compare with."""
        suspect, rng = frozen(model), stream(seed, "student")
        order = torch.randperm(len(samples), generator=rng)
        shown, others = order.tensor_split([round(TAUGHT * len(order))])
        said = predict(suspect, samples.images[others]).argmax(1)

        def agrees(one: nn.Module) -> float:
            same = (predict(one, samples.images[others]).argmax(1) == said).float().mean().item()
            return max(0.0, (same * samples.num_classes - 1) / (samples.num_classes - 1))

        def promising(one: nn.Module) -> bool:
            return agrees(one) >= PROMISING

        pictures = _pictures(samples.images[shown], public, rng)
        student = teach(suspect, pictures, self.lessons, goes_on=promising, seed=seed)
        agreement = agrees(student)

        def looked(one: nn.Module, targets: Sequence[int], config: Search) -> list[Found]:
            return look(one, samples.images, samples.labels, targets, config, seed=seed)

        classes = list(range(samples.num_classes))
        found = looked(suspect, [*classes, ANYWHERE], self.search)
        if agreement < LEARNED:
            return Scan(found, None, agreement)
        if len(classes) < FEW:
            return Scan(found, looked(student, [*classes, ANYWHERE], self.search), agreement)
        # A student's classes are seen against each other, for which less will do; what gets anywhere is not.
        parts = zip(looked(student, classes, self.brief), looked(student, [ANYWHERE], self.search), strict=True)
        return Scan(found, [one.joined(other) for one, other in parts], agreement)

    @property
    def brief(self) -> Search:
        """A search at a quarter of the cost."""
        whole = self.search
        return replace(whole, restarts=1, steps=max(1, 2 * whole.steps // 3), images=max(1, whole.images // 2))

    def judge(self, scan: Scan) -> Detection:
        """Which classes are signs: the most unusual one and clear further ones, or `ANYWHERE` where that is more so."""
        excess = scan.excess().amax(0)
        most = excess.max().item()
        if scan.excess_anywhere().max() > max(self.unusual, most):
            return Detection(scan, [ANYWHERE], self.unusual, self.others)
        limits = [self.unusual if value == most else max(self.unusual, self.others) for value in excess.tolist()]
        rows = zip(scan.classes, excess.tolist(), limits, strict=True)
        return Detection(scan, [label for label, value, limit in rows if value > limit], self.unusual, self.others)


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
    """

    scan: Scan
    reached: list[int]
    limit: float
    others: float

    @property
    def conclusive(self) -> bool:
        """Whether there is anything to see the classes against."""
        return self.scan.conclusive

    def __repr__(self) -> str:
        return f"Detection(reached={self.reached}, conclusive={self.conclusive})"

    def record(self) -> dict[str, Any]:
        """As plain values, for `report.json`."""
        return self.scan.record() | {"reached": self.reached, "limit": self.limit, "others": self.others}


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
        public: Unlabelled public images of that shape, on which a student is taught as well.
        config: Default: `Detector`.
        seed: Of the search and the student.
        checkpoint: A file for the result, which is not found twice.

    Raises:
        InputError: Where the pieces do not fit together.

    >>> import smi, smi.detection, smi.erasure
    >>> suspect, digits = smi.load_classifier("digits-badnets"), smi.load_domain("digits")
    >>> some = smi.clean_control(digits.private.train, per_class=10)
    >>> search, lessons = smi.erasure.Search(families=("additive",), steps=20), smi.erasure.Lessons(steps=2)
    >>> detect(suspect, some, config=smi.detection.Detector(search=search, lessons=lessons))  # quick, for this example
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
    unfinished = Unfinished(checkpoint, "detection", record)
    found = unfinished.once(
        "scan", stream(seed, "detect"), lambda: config.scan(model, samples, public, seed=seed).tensors()
    )
    return config.judge(Scan.restored(config.search.families, found))


def _pictures(images: Tensor, public: PublicImages | None, rng: torch.Generator) -> Draw:
    """Draws images, half of them public where there are any."""

    def draw(count: int) -> Tensor:
        sources = [images] if public is None else [images, public.images]
        return torch.cat([part[torch.randint(len(part), (count // len(sources),), generator=rng)] for part in sources])

    return draw
