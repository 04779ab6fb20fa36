"""How a piece of work is done: handed down from the call that a user makes to the loop that does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smi.runtime.progress import track
from smi.runtime.seeding import derive, stream
from smi.runtime.unfinished import (
    Tensors,
    Unfinished,
    named,
    nothing_kept,
    optimizer_state,
    part,
    restore,
    restore_optimizer,
    states,
)

OnRound = Callable[[nn.Module, int], Any]


def unwatched(model: nn.Module, index: int) -> None:
    """What looks at a model in training where nobody does."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a removal is handed beside the model and its images.

    Attributes:
        seed: Of everything random.
        unfinished: Where the state is kept from which the work goes on if it is stopped.
        on_round: Called with the model in training and its round, 0 before the first, and after each. The model is to
            be looked at, not changed.
    """

    seed: int = 0
    unfinished: Unfinished = field(default_factory=nothing_kept)
    on_round: OnRound = unwatched

    def rng(self, stage: str) -> torch.Generator:
        """The random stream of a stage."""
        return stream(self.seed, stage)

    def derive(self, stage: str) -> int:
        """The seed of a stage that has streams of its own."""
        return derive(self.seed, stage)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Rounds of training that go on where they were stopped.

    Attributes:
        name: Of the loop, another for each of the same job.
        rounds: How many.
        trained: The tensors that it changes in place, by name; `torch.nn.Module.state_dict` gives a model's.
        optimizer: Its state is kept, too.
        generators: All that a round draws from.
        curves: Lists that a round appends to, by name.
        shows: What a progress bar is called; None for no bar.
    """

    name: str
    rounds: int
    trained: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    generators: Sequence[torch.Generator]
    curves: Mapping[str, list[float]]
    shows: str | None = None

    def run(self, job: Job, one_round: Callable[[int], Any], told: Callable[[int], Any] = lambda index: None) -> None:
        """Do what is left of it.

        Args:
            job: Where the state is kept.
            one_round: Does the round of this number, from 0.
            told: Is called with the number of rounds that are done, before the first and after each.
        """
        unfinished = job.unfinished
        done = self._take_up(unfinished.of(self.name))
        told(done)
        left: Sequence[int] | Any = range(done, self.rounds)
        if self.shows is not None:
            left = track(left, self.shows, self.rounds, before=done)
        with unfinished.working() as after_round:
            for index in left:
                one_round(index)
                told(index + 1)
                after_round(lambda done=index + 1: named(self.name, self._state(done)))  # type: ignore[misc]
        unfinished.finish(self.name, self._state(self.rounds))

    def _state(self, done: int) -> Tensors:
        found = named("trained", self.trained) | named("optimizer", optimizer_state(self.optimizer))
        found |= named("generators", states(self.generators)) | {"rounds": torch.tensor(done)}
        return found | named("curves", {k: torch.tensor(v, dtype=torch.float64) for k, v in self.curves.items()})

    def _take_up(self, left: Tensors) -> int:
        """Go back to a state, if there is one. Returns the number of rounds that are done."""
        if not left:
            return 0
        with torch.no_grad():
            for name, value in part("trained", left).items():
                self.trained[name].copy_(value)
        restore_optimizer(self.optimizer, part("optimizer", left))
        restore(self.generators, part("generators", left))
        for name, values in part("curves", left).items():
            self.curves[name][:] = values.tolist()
        return int(left["rounds"])
