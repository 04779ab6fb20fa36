"""Inversion, written once: every method is this loop with its own start, objective and projection.

For one class y at a time (for all at once where a method says so), variables (latents, or pixels) are optimised
together by Adam so that the images they stand for are classified as y.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from smi.domains.base import Samples
from smi.errors import InputError
from smi.inversion.selection import Selection, most_stable, select_stable
from smi.priors.base import Prior, check_prior
from smi.runtime.checks import check_model, check_number, device_of
from smi.runtime.compute import Runner, fast, fingerprint_of, frozen
from smi.runtime.memory import Chunk, halving
from smi.runtime.precision import asked_precision, mixed
from smi.runtime.progress import track
from smi.runtime.seeding import stream
from smi.runtime.unfinished import (
    EVERY,
    AfterStep,
    Tensors,
    Unfinished,
    named,
    optimizer_state,
    part,
    restore_optimizer,
)
from smi_kernels import Registry


@dataclass
class Task:
    """What an inversion step may see: the suspect model (frozen), how to run it, the prior, the class, randomness."""

    model: nn.Module
    run: Runner
    prior: Prior
    labels: Tensor
    rng: torch.Generator
    progress: float = 0.0
    choose: Callable[[Tensor, Tensor], Tensor] | None = None
    """Says which of some candidates, images ``[N, C, H, W]`` and labels, go on once they can be told apart."""
    after_step: AfterStep = lambda state: None
    left: Tensors = field(default_factory=dict)
    """What a search that was stopped left behind; empty where it begins."""

    def generate(self, z: Tensor) -> Tensor:
        """Images float32 ``[N, C, H, W]`` in [0, 1] for latents, through the prior."""
        with mixed(z.device):
            return self.prior.generate(z).float()

    def realism(self, images: Tensor) -> Tensor | None:
        """The critic's ``[N]``, float32, or None without a critic."""
        with mixed(images.device):
            score = self.prior.criticise(images)
        return None if score is None else score.float()


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """Base of every inversion.

    Attributes:
        steps: Adam steps.
        lr: Their rate, in units of the variable.
        version: Raised by hand when the numbers change that the method gives: studies then make its samples again.
    """

    steps: int = 60
    lr: float = 0.1

    name = "inversion"
    version: ClassVar[int] = 1
    joint = False  # whether a batch holds all classes, because its statistics are part of the objective

    def __post_init__(self) -> None:
        check_number("steps", self.steps, low=0, integer=True)
        check_number("lr", self.lr, low=0)

    def start(self, task: Task) -> Tensor:
        """The initial variable, one row a label of ``task.labels``."""
        raise NotImplementedError

    def render(self, variable: Tensor, task: Task) -> Tensor:
        """The images ``[N, C, H, W]`` in [0, 1] that the variable stands for, differentiable."""
        raise NotImplementedError

    def objective(self, images: Tensor, variable: Tensor, task: Task) -> Tensor:
        """The scalar to minimise."""
        raise NotImplementedError

    def project(self, variable: Tensor) -> None:
        """Bring the variable back to its feasible set, in place, after a step."""

    @property
    def settled(self) -> int:
        """Steps after which candidates can be told apart, and only chosen ones go on; by default all go to the end."""
        return self.steps

    def optimise(self, task: Task) -> Tensor:
        """The loop. Returns images ``[N, C, H, W]``, detached, on the CPU; fewer than labels where some were chosen."""
        left = task.left
        variable = (left["variable"] if left else self.start(task)).to(task.labels.device).requires_grad_()
        task.labels = task.labels[: len(variable)]  # of one class, where candidates were chosen before
        optimizer = torch.optim.Adam([variable], self.lr)
        if left:
            restore_optimizer(optimizer, part("optimizer", left))
            task.rng.set_state(left["rng"])
        for step in range(int(left.get("steps", 0)), self.steps):
            task.progress = step / self.steps
            if step == self.settled and task.choose is not None:
                with torch.no_grad():
                    kept = task.choose(self.render(variable, task).clamp(0, 1), task.labels)
                variable, task.labels = variable.detach()[kept].requires_grad_(), task.labels[kept]
                optimizer = torch.optim.Adam([variable], self.lr)
            loss = self.objective(self.render(variable, task), variable, task)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                self.project(variable)
            done = {"steps": torch.tensor(step + 1), "rng": task.rng.get_state(), "variable": variable}
            adam = optimizer
            task.after_step(lambda done=done, adam=adam: done | named("optimizer", optimizer_state(adam)))  # type: ignore[misc]
        with torch.no_grad():
            return self.render(variable, task).clamp(0, 1).cpu()


JOINT = 512  # images in a batch of all classes

inversions: Registry[type[Inversion]] = Registry("inversion")


def invert(
    model: nn.Module,
    prior: Prior,
    method: Inversion,
    *,
    per_class: int = 30,
    selection: Selection | None = None,
    classes: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: float = EVERY,
) -> Samples:
    """Reconstruct ``per_class`` images of every class of the suspect model, without any in-distribution data.

    Args:
        model: Images in [0, 1] to logits.
        prior: A generator of public images; the pixel methods use its image shape only.
        method: Such as `Stabilized`.
        per_class: Images of every class.
        selection: ``selection.oversample`` times as many candidates are made and the most stable ones kept, as soon as
            the method has `settled` them. None keeps what the inversion gave, unscored.
        classes: The class count, checked where given.
        seed: Of everything random.
        checkpoint: A file for the state. Where it exists, the inversion goes on from it, to the same images.
        every: Seconds between two writings of it. It is written before Ctrl-C and SIGTERM end the work, too.

    Returns:
        `Samples`, class by class, source ``method.name``.

    Raises:
        InputError: Before any work where model, prior and class count do not fit together.

    >>> import smi
    >>> suspect, prior = smi.load_classifier("digits-badnets"), smi.load_prior("digits")
    >>> invert(suspect, prior, smi.Stabilized(steps=2), per_class=2)
    Samples(20 smi images of 10 classes, (1, 32, 32))
    """
    check_number("per_class", per_class, low=1, integer=True)
    if not isinstance(method, Inversion):
        raise InputError(f"method is a {type(method).__name__}. Allowed: an Inversion such as smi.Stabilized().")
    check_prior(prior)
    num_classes = check_model(model, torch.zeros(1, *prior.image_shape), classes)
    if isinstance(prior, nn.Module):
        prior = cast(Prior, frozen(prior).to(device_of(model)))
    count = per_class * (1 if selection is None else selection.oversample)
    record = {"method": method.name} | asdict(method) | {"count": count, "seed": seed, "precision": asked_precision()}
    record |= {"selection": None if selection is None else asdict(selection)}
    if checkpoint is not None:
        record |= {"model": fingerprint_of(model), "prior": fingerprint_of(prior)}
    unfinished = Unfinished(checkpoint, "inversion", record, every=every)
    batches = _batches(num_classes, count, joint=method.joint)
    made = _Made(model, frozen(model), prior, method, selection, num_classes, seed, max(map(len, batches)))
    made.take_up(unfinished.tensors)
    left = _without(batches, made.done)
    with fast(made.suspect) as run, unfinished.working() as after_step:
        for batch in track(left, f"inversion ({method.name})", total=len(batches), before=len(batches) - len(left)):
            made.add(batch, run, after_step)
    unfinished.save(made.state())
    samples = made.samples()
    return samples if selection is None else select_stable(model, samples, per_class, selection, seed=seed)


class _Made:
    """What an inversion has made so far, and what is left of a search that was stopped.

    Attributes:
        done: Candidates whose search is over; of some only those that were chosen are left.
    """

    def __init__(
        self, model: nn.Module, suspect: nn.Module, prior: Prior, method: Inversion, selection: Selection | None,
        classes: int, seed: int, together: int,
    ) -> None:  # fmt: skip
        self.suspect, self.done = suspect, 0
        self._model, self._prior, self._method, self._selection = model, prior, method, selection
        self._classes, self._seed, self._chunk = classes, seed, Chunk(together)
        self._images: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._search: Tensors = {}

    def take_up(self, left: Tensors) -> None:
        """Go on from what `state` gave; nothing where that is empty."""
        self._images, self._labels = (_in_order(part(name, left)) for name in ("images", "labels"))
        self._search = part("search", left)
        self.done = int(left.get("done", 0))
        self._chunk = Chunk(int(left.get("chunk", self._chunk.size)))

    def state(self) -> Tensors:
        """As tensors."""
        found = {f"images.{index}": one for index, one in enumerate(self._images)}
        found |= {f"labels.{index}": one for index, one in enumerate(self._labels)}
        return found | {"chunk": torch.tensor(self._chunk.size), "done": torch.tensor(self.done)}

    def add(self, batch: Tensor, run: Runner, after_step: AfterStep) -> None:
        """Search images of these labels, in parts where memory does not suffice for all."""

        def search(wanted: Tensor) -> tuple[Tensor, Tensor, int]:
            return self._searched(wanted, run, after_step)

        for found, called, count in halving(search, batch, self._chunk):
            self._images.append(found)
            self._labels.append(called)
            self.done += count
            self._search = {}
            after_step(self.state)

    def samples(self) -> Samples:
        """Class by class."""
        labels = torch.cat(self._labels)
        order = labels.argsort(stable=True)
        return Samples(torch.cat(self._images)[order], labels[order], self._classes, self._method.name)

    def _searched(self, wanted: Tensor, run: Runner, after_step: AfterStep) -> tuple[Tensor, Tensor, int]:
        """Images and labels, and the number of candidates that they are chosen of."""
        fits = bool(self._search) and int(self._search["candidates"]) == len(wanted)  # not after memory ran out in it
        left = {name: value.clone() for name, value in self._search.items()} if fits else {}
        rng, labels = stream(self._seed, f"invert/{len(self._images)}"), wanted.to(device_of(self.suspect))
        task = Task(self.suspect, run, self._prior, labels, rng, left=left)
        task.choose = None if self._selection is None or self._method.joint else self._chosen
        candidates = {"candidates": torch.tensor(len(wanted))}
        task.after_step = lambda state: after_step(lambda: self.state() | named("search", state() | candidates))
        found = self._method.optimise(task)
        return found, task.labels.cpu(), len(wanted)

    def _chosen(self, candidates: Tensor, wanted: Tensor) -> Tensor:
        """Positions of the most stable candidates of each class."""
        assert self._selection is not None
        given = Samples(candidates.cpu(), wanted.cpu(), self._classes, self._method.name)
        kept, labels = math.ceil(len(given) / self._selection.oversample), wanted.unique().tolist()
        return most_stable(self._model, given, kept, self._selection, labels, seed=self._seed)[0].to(wanted.device)


def _in_order(parts: Tensors) -> list[Tensor]:
    return [value for _, value in sorted(parts.items(), key=lambda item: int(item[0]))]


def _batches(num_classes: int, count: int, *, joint: bool) -> list[Tensor]:
    """Labels ``[N]`` of what is optimised together: ``count`` of one class, or of all classes in turn."""
    if joint:
        return list(torch.arange(num_classes).repeat(count).split(max(JOINT, num_classes)))
    return [torch.full((count,), label) for label in range(num_classes)]


def _without(batches: list[Tensor], done: int) -> list[Tensor]:
    """What is left of the batches after ``done`` images."""
    left = []
    for batch in batches:
        if len(batch) > done:
            left.append(batch[done:])
        done = max(0, done - len(batch))
    return left
