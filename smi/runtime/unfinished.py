"""Long work that goes on where it was stopped: its state lies in one file, written now and then and before it stops.

The file holds tensors and the record of what work it is the state of; nothing in it is run. A state is taken up only by
the same work, and on the same machine with as many threads the end is then the same to the bit as if nothing had
happened.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi.errors import InputError
from smi.runtime.files import LEFTOVERS, load_tensors, save_tensors
from smi.runtime.signals import Stopped, delayed_signals

EVERY = 30.0

Tensors = dict[str, Tensor]
AfterStep = Callable[[Callable[[], Tensors]], None]


class _Halt(BaseException):
    """Out of a block of steps, because a signal came."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Unfinished:
    """The state of a piece of long work.

    Args:
        file: Where it is kept, or None to keep nothing.
        kind: Of work, for messages.
        record: What tells this work from others of its kind, as JSON can hold it.
        every: Seconds between two writings.

    Attributes:
        tensors: What was left of the work; empty at its beginning.

    Raises:
        InputError: Where the file is broken or is of other work.
    """

    def __init__(self, file: str | Path | None, kind: str, record: Mapping[str, Any], *, every: float = EVERY) -> None:
        self._file, self._kind, self._every = None if file is None else Path(file), kind, every
        self._record = json.loads(json.dumps(dict(record), default=str))
        self._written = time.monotonic()
        self.tensors: Tensors = {}
        self._once: Tensors = {}
        if self._file is None or not self._file.exists():
            return
        self.tensors, meta = load_tensors(self._file, f"unfinished {kind}")
        if meta.get("record") != self._record:
            raise InputError(
                f"{self._file} is of another {kind}: {_difference(meta.get('record'), self._record)}. "
                "Go on with what it was begun with, or begin again elsewhere."
            )
        self._once = {name: value for name, value in self.tensors.items() if name.startswith("once.")}

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Write the state, atomically; nothing where there is no file."""
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # Tied weights are one tensor under two names, which safetensors does not write.
            copies = {name: value.detach().clone() for name, value in (self._once | dict(state)).items()}
            save_tensors(self._file, copies, {"kind": f"unfinished {self._kind}", "record": self._record})
            self._written = time.monotonic()

    def of(self, name: str) -> Tensors:
        """What was left of the part ``name`` of the work, or what it gave where it is finished; empty before."""
        return part(f"once.{name}", self._once) or part(name, self.tensors)

    def finish(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Write the last state of a part of the work, once: it stays while other parts go on."""
        if self._file is not None and not part(f"once.{name}", self._once):
            self._once |= named(f"once.{name}", {key: value.detach().clone() for key, value in state.items()})
            self.save({})

    @contextmanager
    def working(self) -> Iterator[AfterStep]:
        """A block of steps. Yields what to call after each, with a function that gives the state.

        It writes the state where that is due. Ctrl-C and SIGTERM wait for the step and for a last writing, and then
        leave the block; without a file they are not held back.
        """
        if self._file is None:
            yield lambda state: None
            return
        halted: _Halt | None = None
        with delayed_signals() as stop:

            def after_step(state: Callable[[], Tensors]) -> None:
                came = stop()
                if came is not None or time.monotonic() - self._written >= self._every:
                    self.save(state())
                if came is not None:
                    raise _Halt(came)

            try:
                yield after_step
            except _Halt as halt:
                halted = halt
        if halted is not None:  # and nobody's handler has raised anything
            raise Stopped(halted.number)

    def once(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """``compute()``, or what it gave before the work was stopped: not empty, and of nobody's random generator."""
        kept = self.of(name)
        if not kept:
            kept = compute()
            self.finish(name, kept)
        return kept


@contextmanager
def workplace(out: Path, *, resume: bool, force: bool = False) -> Iterator[Path]:
    """The folder ``OUT.unfinished`` for the states of the work that leads to ``out``; gone when the block ends well.

    It is made with the first state that is written to it.

    Args:
        out: Where the work leads, a file or a folder.
        resume: Go on from what a stopped process left.
        force: Begin again where a stopped process left something.

    Raises:
        InputError: Where a stopped process left one and neither ``resume`` nor ``force`` is asked for.
    """
    place = out.absolute()
    folder = place.with_name(f"{place.name}.unfinished")
    if folder.exists() and not resume:
        if not force:
            raise InputError(f"{folder} holds work that was stopped. Go on with it: --resume. Or begin again: --force.")
        _clear(folder)
    yield folder
    _clear(folder)


def _clear(folder: Path) -> None:
    """Remove the states in the folder, and the folder unless someone put something else there."""
    for file in [*folder.glob("*.safetensors"), *folder.glob(LEFTOVERS)]:
        file.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def nothing_kept() -> Unfinished:
    """The state of work that cannot, or need not, go on."""
    return Unfinished(None, "work", {})


def named(head: str, state: Mapping[str, Tensor]) -> Tensors:
    """``state`` with ``head.`` before each name."""
    return {f"{head}.{name}": value for name, value in state.items()}


def part(head: str, state: Mapping[str, Tensor]) -> Tensors:
    """What `named` put under ``head``."""
    return {name[len(head) + 1 :]: value for name, value in state.items() if name.startswith(f"{head}.")}


def states(generators: Sequence[torch.Generator]) -> Tensors:
    """The states of random generators, numbered."""
    return {str(index): rng.get_state() for index, rng in enumerate(generators)}


def restore(generators: Sequence[torch.Generator], state: Mapping[str, Tensor]) -> None:
    """Take up what `states` gave."""
    for index, rng in enumerate(generators):
        rng.set_state(state[str(index)])


def optimizer_state(optimizer: torch.optim.Optimizer) -> Tensors:
    """The tensors of an optimizer, "PARAMETER.SLOT"."""
    slots = optimizer.state_dict()["state"]
    return {f"{index}.{slot}": torch.as_tensor(value) for index, of in slots.items() for slot, value in of.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Take up what `optimizer_state` gave; groups and their settings stay the optimizer's own."""
    slots: dict[int, Tensors] = {}
    for name, value in state.items():
        index, slot = name.split(".")
        slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def _difference(theirs: Any, ours: Any, name: str = "") -> str:
    """Where two records differ first, for a message."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in [*ours, *theirs]:
            if theirs.get(key) != ours.get(key):
                return _difference(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
    return f"{name or 'the record'} was {theirs!r} there and is {ours!r} here"
