"""Does a suspect model carry a backdoor? What a defender can say without clean data.

A class with a backdoor is reached from all other images by a smaller universal δ than other classes (Wang et al.,
"Neural Cleanse", S&P 2019). How small a δ is usual depends on the class: a few strokes make an 8 of any digit, in a
sound model as in a backdoored one. So the yardstick is a *student*: a model of the same architecture with fresh weights
that is taught, on unstamped images, the labels that the suspect gives them. It learns the task; nothing tells it of the
trigger. Labels alone, because the suspect's small probabilities would (see `smi.defenses.restart`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from smi.checks import check_model, check_number, device_of
from smi.compute import Runner, asked_precision, fast, fingerprint_of, frozen, predict
from smi.defenses.base import check_public
from smi.defenses.universal import data_scale, fooling_rate, universal
from smi.domains.base import PublicImages
from smi.erasure.student import Lessons, teach
from smi.files import fingerprint
from smi.priors import Prior, check_prior, sample_latents
from smi.seeding import stream
from smi.unfinished import Tensors, Unfinished

UNUSUAL = 0.4
"""Ratio below which a class stands out. Between patches (0.16 to 0.28) and clean models (0.50 and more) on one small
CNN of digits, development seeds 100 to 103; other architectures may need another."""

STEP = 1.15  # from one radius of the grid to the next


@dataclass(frozen=True, eq=False)
class Detection:
    """What `detect` found.

    classes: labels that were examined. suspect, student: L2 radius in [0, 1] pixels ``[T]`` of the smallest universal δ
    that sends half of the other classes' images to each, on either model. agreement: share in [0, 1] of fresh generator
    images on which the student says what the suspect says; below `LEARNED` it is no yardstick.
    """

    classes: list[int]
    suspect: Tensor
    student: Tensor
    agreement: float

    LEARNED = 0.5
    LEAST = 4  # classes: of fewer, the median may be the backdoor's own

    @property
    def ratio(self) -> Tensor:
        """Radius on the suspect in units of that on the student, divided by the median class's: 1 is usual."""
        ratio = self.suspect / self.student
        return ratio / ratio.median()

    @property
    def conclusive(self) -> bool:
        """Whether there are classes enough to compare, and a student that has learned enough to compare with."""
        enough = len(self.classes) >= self.LEAST and self.agreement >= self.LEARNED
        return enough and bool(self.ratio.isfinite().all())

    @property
    def reached(self) -> list[int]:
        """Labels that an unusually small δ reaches, the smallest ratio first; none where nothing can be said."""
        if not self.conclusive:
            return []
        order = self.ratio.argsort()
        return [self.classes[i] for i in order.tolist() if self.ratio[i] < UNUSUAL]

    def record(self) -> dict[str, Any]:
        """As plain values, for `report.json`."""
        return {
            "classes": self.classes,
            "radius": self.suspect.tolist(),
            "radius_of_student": self.student.tolist(),
            "ratio": self.ratio.tolist(),
            "unusual_below": UNUSUAL,
            "student_agrees": self.agreement,
            "reached": self.reached,
        }


@dataclass(frozen=True, kw_only=True)
class Detector:
    """How `detect` looks. lessons: steps of the student. batch_size: images a step. lr: of AdamW. goal: share of the
    other classes' images that a δ must reach. steps: ascent steps for a δ. images: that it is searched on. most:
    classes examined; of more, those that ``fooling`` puts first and as many others."""

    lessons: int = 200
    batch_size: int = 96
    lr: float = 3e-3
    goal: float = 0.5
    steps: int = 5
    images: int = 40
    most: int = 20

    def __post_init__(self) -> None:
        for whole in ("lessons", "batch_size", "steps", "images", "most"):
            check_number(whole, getattr(self, whole), low=1, integer=True)
        check_number("lr", self.lr, low=0)
        check_number("goal", self.goal, low=0.01, high=1)


def detect(
    model: nn.Module,
    prior: Prior,
    public: PublicImages | None = None,
    config: Detector | None = None,
    *,
    fooling: Sequence[float] | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> Detection:
    """Compare how far each class is from all images, on the suspect and on a student of it.

    model: images ``[N, C, H, W]`` in [0, 1] to logits; left as it is. prior: a generator of such images. public:
    unlabelled public images of that shape, if there are any. fooling: share in [0, 1] of images that some δ sent to
    each class ``[classes]``, where a removal has measured that; with many classes the highest are examined. checkpoint:
    a file for the result, which is not found twice. Raises `InputError` where the pieces do not fit together.
    """
    check_prior(prior)
    check_model(model, torch.zeros(1, *prior.image_shape))
    check_public(public, prior.image_shape)
    config = config or Detector()
    record: dict[str, Any] = asdict(config) | {"fooling": None if fooling is None else list(fooling), "seed": seed}
    record |= {"precision": asked_precision()}
    if checkpoint is not None:
        record |= {"model": fingerprint_of(model), "prior": fingerprint_of(prior)}
        record |= {"public": None if public is None else fingerprint(public.images)}

    def found() -> Tensors:
        return _found(model, prior, public, config, fooling, seed)

    kept = Unfinished(checkpoint, "detection", record).once("found", stream(seed, "detect"), found)
    return Detection(kept["classes"].tolist(), kept["suspect"], kept["student"], kept["agreement"].item())


def _found(
    model: nn.Module,
    prior: Prior,
    public: PublicImages | None,
    config: Detector,
    fooling: Sequence[float] | None,
    seed: int,
) -> Tensors:
    suspect, device = frozen(model), device_of(model)
    pupil = cast(Prior, frozen(prior).to(device)) if isinstance(prior, nn.Module) else prior
    pictures = _Pictures(pupil, public, device, stream(seed, "student"))
    lessons = Lessons(steps=config.lessons, batch_size=config.batch_size, lr=config.lr)
    student = teach(suspect, pictures.draw, lessons, seed=seed)
    shown = pictures.draw(config.images)
    labels = predict(suspect, shown).argmax(1).to(device)
    count = predict(suspect, shown[:1]).shape[1]
    classes = _examined(count, config.most, fooling, stream(seed, "examined"))
    fresh = pictures.generated(10 * config.images)
    agreement = (predict(suspect, fresh).argmax(1) == predict(student, fresh).argmax(1)).float().mean().item()
    found = {"classes": torch.tensor(classes), "agreement": torch.tensor(agreement)}
    for name, one in (("suspect", suspect), ("student", student)):
        with fast(one) as run:
            found[name] = class_radii(run, shown, labels, classes, config, stream(seed, "radii"))
    return found


def class_radii(
    run: Runner, images: Tensor, labels: Tensor, classes: list[int], config: Detector, rng: torch.Generator
) -> Tensor:
    """For each class the smallest radius ``[T]`` at which a universal δ sends a share ``config.goal`` of the other
    classes' images there. Bisection over `STEP`-fold steps from 2 % to 120 % of the images' `data_scale`, all classes
    at once."""
    scale = data_scale(images)
    grid = [0.02 * scale]
    while grid[-1] < 1.2 * scale:
        grid.append(STEP * grid[-1])
    targets, radii = torch.tensor(classes), torch.tensor(grid)
    low, high = torch.zeros_like(targets), torch.full_like(targets, len(grid) - 1)
    while (open_ := low < high).any():
        middle = (low + high) // 2
        radius = radii[middle].view(-1, 1, 1, 1).to(images.device)
        delta = universal(run, images, labels, targets, radius=radius, steps=config.steps, rng=rng)
        hit = fooling_rate(run, images, labels, targets, delta) >= config.goal
        high, low = torch.where(hit & open_, middle, high), torch.where(~hit & open_, middle + 1, low)
    return radii[low]


class _Pictures:
    """Unstamped images: half from the generator and half public ones, where there are any."""

    def __init__(self, prior: Prior, public: PublicImages | None, device: torch.device, rng: torch.Generator) -> None:
        self._prior, self._public, self._device, self._rng = prior, public, device, rng

    @torch.no_grad()
    def generated(self, count: int) -> Tensor:
        """``[count, C, H, W]`` from the generator."""
        z = sample_latents(self._prior, count, self._rng).to(self._device)
        return torch.cat([self._prior.generate(part).float().clamp(0, 1) for part in z.split(256)])

    def draw(self, count: int) -> Tensor:
        """``[count, C, H, W]``."""
        if self._public is None:
            return self.generated(count)
        chosen = torch.randint(len(self._public), (count // 2,), generator=self._rng)
        return torch.cat([self.generated(count - count // 2), self._public.images[chosen].to(self._device)])


def _examined(count: int, most: int, fooling: Sequence[float] | None, rng: torch.Generator) -> list[int]:
    if count <= most:
        return list(range(count))
    order = torch.randperm(count, generator=rng)
    if fooling is not None:
        likely = torch.tensor(fooling)[order].argsort(descending=True, stable=True)
        order = torch.cat([order[likely[: most // 2]], order[likely[most // 2 :].sort().values]])  # others: by chance
    return sorted(order[:most].tolist())
