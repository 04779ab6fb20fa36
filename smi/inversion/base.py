"""Inversion, written once: every method is this loop with its own start, objective and projection.

For one class y at a time (for all at once where a method says so), variables (latents, or pixels) are optimised
together by Adam so that the images they stand for are classified as y.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from smi.checks import check_model, check_number, device_of
from smi.compute import Runner, asked_precision, fast, fingerprint_of, frozen, mixed
from smi.domains.base import Samples
from smi.errors import InputError
from smi.memory import Chunk, halving
from smi.priors import Prior, check_prior
from smi.progress import track
from smi.seeding import stream
from smi.stability import Selection, most_stable, select_stable
from smi.unfinished import EVERY, AfterStep, Tensors, Unfinished, named, optimizer_state, part, restore_optimizer
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
    """

    steps: int = 60
    lr: float = 0.1

    name = "inversion"
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
    suspect, device = frozen(model), device_of(model)
    if isinstance(prior, nn.Module):
        prior = cast(Prior, frozen(prior).to(device))
    count = per_class * (1 if selection is None else selection.oversample)
    batches = _batches(num_classes, count, joint=method.joint)
    record = {"method": method.name} | asdict(method) | {"count": count, "seed": seed, "precision": asked_precision()}
    record |= {"selection": None if selection is None else asdict(selection)}
    if checkpoint is not None:
        record |= {"model": fingerprint_of(model), "prior": fingerprint_of(prior)}
    unfinished = Unfinished(checkpoint, "inversion", record, every=every)
    images, labels = (_in_order(part(name, unfinished.tensors)) for name in ("images", "labels"))
    search = part("search", unfinished.tensors)
    done = int(unfinished.tensors.get("done", 0))  # candidates; of some only those that were chosen are left

    chunk = Chunk(int(unfinished.tensors.get("chunk", max(map(len, batches)))))

    def so_far() -> Tensors:
        found = {f"images.{index}": one for index, one in enumerate(images)}
        found |= {f"labels.{index}": one for index, one in enumerate(labels)}
        return found | {"chunk": torch.tensor(chunk.size), "done": torch.tensor(done)}

    def choose(candidates: Tensor, wanted: Tensor) -> Tensor:
        assert selection is not None
        given = Samples(candidates.cpu(), wanted.cpu(), num_classes, method.name)
        kept = math.ceil(len(given) / selection.oversample)
        return most_stable(model, given, kept, selection, wanted.unique().tolist(), seed=seed)[0].to(wanted.device)

    def search_for(wanted: Tensor) -> tuple[Tensor, Tensor, int]:
        fits = bool(search) and int(search["candidates"]) == len(wanted)  # not after memory ran out in it
        left = {name: value.clone() for name, value in search.items()} if fits else {}
        task = Task(suspect, run, prior, wanted.to(device), stream(seed, f"invert/{len(images)}"), left=left)
        task.choose = None if selection is None or method.joint else choose
        candidates = {"candidates": torch.tensor(len(wanted))}
        task.after_step = lambda state: after_step(lambda: so_far() | named("search", state() | candidates))
        found = method.optimise(task)
        return found, task.labels.cpu(), len(wanted)

    left = _without(batches, done)
    with fast(suspect) as run, unfinished.working() as after_step:
        for batch in track(left, f"inversion ({method.name})", total=len(batches), before=len(batches) - len(left)):
            for found, called, count in halving(search_for, batch, chunk):
                images.append(found)
                labels.append(called)
                done += count
                search = {}
                after_step(so_far)
    unfinished.save(so_far())
    order = torch.cat(labels).argsort(stable=True)
    samples = Samples(torch.cat(images)[order], torch.cat(labels)[order], num_classes, method.name)
    if selection is None:
        return samples
    return select_stable(model, samples, per_class, selection, seed=seed)


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
