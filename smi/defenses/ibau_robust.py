"""I-BAU's min-max problem with a solver that is reliable with a few hundred samples.

    min_θ  E max_{‖δ‖≤C} CE(f_θ(x + δ), y) + distill · KL(f_suspect ‖ f_θ)

What differs from the published solver, and why: the inner maximum is searched afresh each round, from noise, towards
every class and away from all (a single untargeted δ misses the trigger on half of the seeds); all the δ's are stamped,
each as often as it still fools (the worst one alone makes the model oscillate), spread out or concentrated on a few
pixels (a patch comes out of an L2 search with noise around it); C comes from public images, because samples chosen for
stability are hard to fool and would ask for another C each time, and is a multiple of their `natural_radius`, because
a δ no stronger than needed stays weaker than the trigger (on one plain CNN unlearning such δ's left two thirds of
a patch); as many public images are stamped, with the suspect's labels; clean behaviour is held by distillation on
unstamped samples and public images, so that accuracy costs little (neither is done with public images in which the
suspect recognises nothing, see `recognised`), but not firmly, because what the suspect says of them holds some of the
backdoor, too; the rate is as much less as a trial step asks for, because long steps on the first δ's wreck some models
(`smi/defenses/trial.py`); and the outer gradient is first-order: δ is found afresh, so that nothing implicit is left to
follow.

With more δ's than twice `Robust.targets` each is stamped seldom, while clean behaviour is held as firmly as ever. There
the δ's are stamped by the square of how they fool at the natural radius, where a backdoor stands out (at C all classes
are reached), and distillation weighs as much less as there are more δ's. Chosen on traffic signs of 29 classes (three
attacks, development seed 100): of a blended trigger clean samples left 28 % before, SMI's 67 %; with the first 13 and
12 %, with both 0.5 and 1.2 % (at four times today's weight of distillation). Twice the rounds did not help.

For what no δ resembles there is `smi/defenses/ibau_restarted.py`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.augment import vary
from smi.checks import check_number, device_of
from smi.compute import Runner, fast, frozen, predict
from smi.defenses.answers import TrustedAnswers
from smi.defenses.base import Schedule, ask, bearable, recognised, train_repair
from smi.defenses.trial import tried
from smi.defenses.universal import AWAY, concentrate, fooling_rate, into_ball, natural_radius, universal
from smi.domains.base import PublicImages, Samples
from smi.files import fingerprint
from smi.seeding import stream
from smi.unfinished import Tensors, current

SPARSEST = 0.02  # of the pixels, in what is stamped


@dataclass(frozen=True, kw_only=True)
class Robust:
    """The robust solver.

    trial: how far a trial step may move the suspect's answers, in nats, see `tried`; the rate is as much less as that
    takes. 0: no trial. goal: share that fixes the `natural_radius`, of public images, or of the samples where there
    are none. reach: C as a multiple of it. radius: C itself, L2 norm of pixels in [0, 1], instead of that rule.
    stamped: share of each batch that carries a δ. public: public images for each sample, stamped or not. steps: ascent
    steps for a δ; more where `natural_radius` finds them too few. images: samples that a δ is searched on. targets:
    δ's renewed at a time, or half of them where that is more; those that fooled most when last tried. begin: share of
    the rounds, in [0, 1], before δ's are stamped. renew: rounds from one search for δ's to the next. temperature,
    only_trusted: which of the suspect's answers hold clean behaviour, see `TrustedAnswers`.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(rounds=12, lr=3e-3, batch_size=30, distill=20.0))
    trial: float = 0.5
    goal: float = 0.5
    reach: float = 3.0
    radius: float | None = None
    stamped: float = 0.5
    public: float = 1.0
    steps: int = 5
    images: int = 40
    targets: int = 6
    begin: float = 0.0
    renew: int = 1
    temperature: float = 1.0
    only_trusted: bool = False

    name = "robust"
    hold_stream: ClassVar[str] = "distil"
    least_steps: ClassVar[int] = 10
    """Steps a round, at least: with few samples smaller batches, or the min-max ends before it has settled."""

    def __post_init__(self) -> None:
        check_number("trial", self.trial, low=0)
        check_number("goal", self.goal, low=0.01, high=1)
        check_number("reach", self.reach, low=0.01)
        check_number("stamped", self.stamped, low=0.01, high=0.99)
        check_number("public", self.public, low=0)
        check_number("steps", self.steps, low=1, integer=True)
        check_number("images", self.images, low=1, integer=True)
        check_number("targets", self.targets, low=1, integer=True)
        check_number("begin", self.begin, low=0, high=1)
        check_number("renew", self.renew, low=1, integer=True)
        check_number("temperature", self.temperature, low=0, high=1)
        if self.radius is not None:
            check_number("radius", self.radius, low=0)

    def solve(
        self, model: nn.Module, samples: Samples, public: PublicImages | None, seed: int
    ) -> tuple[nn.Module, dict[str, Any], Tensor]:
        """Repaired model, log, and the universal δ per class on the suspect model ``[classes, C, H, W]``.

        That δ, and the log's radius and fooling rates before and after, are at the natural radius, where a class that
        is easy to reach stands out. What is unlearned is longer, see ``reach``.
        """
        inner, held, shared = (stream(seed, name) for name in ("inner", self.hold_stream, "public"))
        adversary = _Adversary(self, model, samples, public, inner)
        classes = torch.arange(samples.num_classes)
        first = current().once("search", inner, lambda: adversary.search(model, classes, adversary.natural))
        known = recognised(frozen(model), public) if self.public else None
        hold = TrustedAnswers(
            model, known, held, temperature=self.temperature, only_trusted=self.only_trusted, per_sample=self.public
        )
        weight = self.schedule.distill * adversary.share
        more = _PseudoLabelled(model, known, shared) if known is not None else None

        def loss(run: Runner, images: Tensor, labels: Tensor) -> Tensor:
            if not adversary.awake:
                return self._clean(run, hold, weight, images, labels)
            count = max(1, round(self.stamped * len(images)))
            shown, wanted = images[:count], labels[:count]
            if more is not None:
                extra, guessed = more.draw(math.ceil(self.public * count))
                shown, wanted = torch.cat([shown, extra]), torch.cat([wanted, guessed])
            value = F.cross_entropy(run(adversary.stamp(shown)), wanted)
            if count == len(images):
                return value
            return value + self._clean(run, hold, weight, images[count:], labels[count:])

        start = self._start(model, samples.images, public, seed)
        fitting = max(2, len(samples) // self.least_steps)
        kept = current().once("rate", inner, lambda: {"lr": self._rate(model, samples, first["delta"])})
        lr = kept["lr"].item()
        schedule = replace(self.schedule, lr=lr, batch_size=min(self.schedule.batch_size, fitting))
        repaired, curve = train_repair(
            start, samples, schedule, loss,
            seed=seed, before_round=adversary.before_round, moving=[adversary, inner, held, shared],
        )  # fmt: skip
        after = adversary.search(repaired, classes, adversary.natural)
        log = {
            "loss": curve,
            "lr": bearable(start, lr),
            "fooling": adversary.curve,
            "radius": adversary.natural,
            "steps": adversary.steps,
            "fooling_before": first["rates"].tolist(),
            "fooling_after": after["rates"].tolist(),
        }
        return repaired, log, first["delta"]

    def _rate(self, model: nn.Module, samples: Samples, delta: Tensor) -> Tensor:
        """The schedule's learning rate, or less: a float64 scalar."""
        lr = self.schedule.lr
        if self.trial:
            some, device = slice(None, None, max(1, len(samples) // 100)), device_of(model)
            images, labels = samples.images[some].to(device), samples.labels[some].to(device)
            lr = tried(model, images, labels, delta, bearable(model, lr), self.trial)
        return torch.tensor(lr, dtype=torch.float64)

    def _clean(self, run: Runner, hold: TrustedAnswers, weight: float, images: Tensor, labels: Tensor) -> Tensor:
        if weight:
            return weight * hold(run, images, labels)
        return F.cross_entropy(run(images), labels)

    def _start(self, model: nn.Module, images: Tensor, public: PublicImages | None, seed: int) -> nn.Module:
        """Where the outer level starts: the suspect model itself."""
        return model


class _PseudoLabelled:
    """Public images, varied afresh each time, with what the suspect model calls them."""

    def __init__(self, model: nn.Module, public: PublicImages, rng: torch.Generator) -> None:
        self._suspect, self._images, self._rng = frozen(model), public.images, rng

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Images ``[count, C, H, W]`` and labels ``[count]``."""
        chosen = self._images[torch.randint(len(self._images), (count,), generator=self._rng)]
        images = vary(chosen.to(device_of(self._suspect)), self._rng)
        return images, ask(self._suspect, images).argmax(1)


_radii: OrderedDict[tuple[object, ...], tuple[float, int, Tensor]] = OrderedDict()
_RADII_KEPT = 64


def _remembered_radius(
    suspect: nn.Module, images: Tensor, labels: Tensor, classes: int, config: Robust, rng: torch.Generator
) -> tuple[float, int]:
    """`natural_radius`, searched once for one question: it is a third of a repair, and the next repair asks it again.

    The question is the model's tensors and its answers, the images, the settings and where ``rng`` stands; what is
    remembered moves ``rng`` on as the search did, so that nothing after it changes.
    """
    state = {name: fingerprint(tensor) for name, tensor in suspect.state_dict().items()}
    asked = (images, labels, predict(suspect, images), rng.get_state())
    key = (*state.items(), *map(fingerprint, asked), classes, config.goal, config.steps)
    if key not in _radii:
        with fast(suspect) as run:
            found = natural_radius(run, images, labels, classes, goal=config.goal, steps=config.steps, rng=rng)
        _radii[key] = *found, rng.get_state()
        if len(_radii) > _RADII_KEPT:
            _radii.popitem(last=False)
    radius, steps, after = _radii[key]
    rng.set_state(after)
    return radius, steps


class _Adversary:
    """The inner level: universal δ's against the current model, and how much each still fools."""

    def __init__(
        self, config: Robust, model: nn.Module, samples: Samples, public: PublicImages | None, rng: torch.Generator
    ) -> None:
        self.config, self.samples, self.rng, self.device = config, samples, rng, device_of(model)
        self.classes = torch.tensor([AWAY, *range(samples.num_classes)])
        self.share = min(1.0, 2 * config.targets / len(self.classes))  # of distillation's weight
        self.many = self.share < 1
        self.rates = torch.full((len(self.classes),), 0.0 if self.many else 1.0)
        self.delta = torch.zeros(len(self.classes), *samples.images.shape[1:])
        self.curve: list[float] = []
        self.first = round(config.begin * config.schedule.rounds)
        self.awake = False  # from round ``first`` on
        self.natural, self.steps = (
            self._natural_radius(model, public) if config.radius is None else (config.radius, config.steps)
        )
        self.radius = self.natural * config.reach if config.radius is None else config.radius

    def _natural_radius(self, model: nn.Module, public: PublicImages | None) -> tuple[float, int]:
        suspect, count = frozen(model), 2 * self.config.images
        if public is None:
            images, labels = self._draw(count)
        else:
            images = public.images[torch.randperm(len(public), generator=self.rng)[:count]]
            labels = predict(suspect, images).argmax(1)
        images, labels = images.to(self.device), labels.to(self.device)

        def found() -> Tensors:
            classes = self.samples.num_classes
            radius, steps = _remembered_radius(suspect, images, labels, classes, self.config, self.rng)
            return {"radius": torch.tensor(radius, dtype=torch.float64), "steps": torch.tensor(steps)}

        answer = current().once("radius", self.rng, found)
        return float(answer["radius"]), int(answer["steps"])

    def state(self) -> Tensors:
        """The δ's, how they fool, and the curve of that."""
        curve = torch.tensor(self.curve, dtype=torch.float64)
        return {"delta": self.delta, "rates": self.rates, "curve": curve}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        self.delta, self.rates, self.curve = state["delta"], state["rates"], state["curve"].tolist()

    def search(self, model: nn.Module, targets: Tensor, radius: float) -> Tensors:
        """Fresh δ's of norm ``radius`` at most, their rates on samples that they were not searched on, and their rates
        when they are shortened to the natural radius."""
        images, labels = self._draw(2 * self.config.images)
        half = len(images) // 2 or 1
        with fast(frozen(model)) as run:
            delta = universal(run, images[:half], labels[:half], targets, radius=radius, steps=self.steps, rng=self.rng)
            held, called = images[half:], labels[half:]
            rates = fooling_rate(run, held, called, targets, delta)
            shorter = into_ball(delta, self.natural)
            return {"delta": delta.cpu(), "rates": rates, "natural": fooling_rate(run, held, called, targets, shorter)}

    def before_round(self, model: nn.Module, index: int) -> None:
        """Every few rounds renew the δ's of the targets that fooled most when last tried (ties at random)."""
        self.awake = index >= self.first
        if not self.awake or (index - self.first) % self.config.renew:
            return
        tie = torch.rand(len(self.rates), generator=self.rng) * 1e-3
        order, count = self.rates + tie, self.config.targets
        if self.many:  # each has its turn within two rounds: a δ that was never searched for is zero
            count = math.ceil(len(order) / 2)
            order += 2.0 * (self.delta == 0).flatten(1).all(1)
        chosen = order.argsort(descending=True)[:count]
        found = self.search(model, self.classes[chosen], self.radius)
        # At C all classes are reached, and where there are many a backdoor's δ would be one of many that are stamped.
        self.rates[chosen] = found["natural"].square() if self.many else found["rates"]
        self.delta[chosen] = found["delta"]
        self.curve.append(found["natural"].max().item())  # at C a sound model is fooled as well

    def stamp(self, images: Tensor) -> Tensor:
        """Each image with one δ, drawn by how much it fools, from spread out to a few pixels."""
        which = torch.multinomial(self.rates + 1e-3, len(images), replacement=True, generator=self.rng)
        share = SPARSEST ** torch.rand(len(images), generator=self.rng)
        return (images + concentrate(self.delta[which], share).to(images.device)).clamp(0, 1)

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        index = torch.randperm(len(self.samples), generator=self.rng)[:count]
        return self.samples.images[index].to(self.device), self.samples.labels[index].to(self.device)
