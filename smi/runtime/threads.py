"""How many threads of the CPU a model runs with: one where it is small, else the cores that this process may use.

The threads of a model wait for each other many times in every pass, and OpenMP and oneDNN spin while they wait. Where
two of them have one core between them, each wait costs a time slice of the system. Training steps on an AVX2 processor,
two threads against one: of the small CNN 1.3 (128 images) to 1.8 times as fast (20) on two free cores, 6 to 37 times
slower on one core; of a small VGG 1.6 times as fast and 4 times slower, of a ResNet-18 2.2 and 2.8. So for small models
a second thread gains little where much can be lost. The number depends on the model and the machine, never on its load:
the same call gives the same bits.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

SMALL = 250_000
"""Weights below which a model runs with one thread. The small CNN has 0.13 M, the small VGG 0.3 M."""

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # how users say it; torch reads both


def usable_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may use: its affinity, less where a control group grants it less time.

    A fraction of a core does not count: its thread would keep the others waiting.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    try:
        usable = os.sched_getaffinity(0)
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        cores = len({(root / siblings.format(cpu)).read_text() for cpu in usable})
    except OSError:
        cores = len(usable)
    return max(1, math.floor(min(_granted(root), cores)))


def _granted(root: Path) -> float:
    """Processors' worth of time that the control groups of this process, and all above them, grant it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    granted = math.inf
    for line in lines:
        controllers, path = line.split(":", 2)[1:]
        if controllers == "":  # version 2, alone or beside version 1
            mounts, read = ("sys/fs/cgroup", "sys/fs/cgroup/unified"), _quota_2
        elif "cpu" in controllers.split(","):
            mounts, read = (f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"), _quota_1
        else:
            continue
        own = Path(path.strip("/"))
        # In a container the path may be the host's, and its own group the root of what is mounted.
        granted = min([granted, *(read(root / mount / part) for mount in mounts for part in (own, *own.parents))])
    return granted


def _quota_2(group: Path) -> float:
    """Of a group of version 2: "max 100000", or microseconds that may be used in a period."""
    try:
        used, period = (group / "cpu.max").read_text().split()
        return math.inf if used == "max" else int(used) / int(period)
    except (OSError, ValueError):
        return math.inf


def _quota_1(group: Path) -> float:
    """Of a group of version 1: -1 microseconds stand for no limit."""
    try:
        used, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return math.inf
    return math.inf if used < 0 else used / period


def suitable(model: nn.Module | None = None) -> int:
    """Threads that suit ``model``: 1 where it has fewer than `SMALL` weights (None stands for such a model)."""
    small = model is None or sum(parameter.numel() for parameter in model.parameters()) < SMALL
    return 1 if small else usable_cores()


def said() -> bool:
    """Whether the user has said how many threads there should be.

    By `use_threads` (``--threads``), by a variable of `VARIABLES`, or by ``torch.set_num_threads``, which shows where
    the number is none that torch has by default: as many as the processors or cores, of the machine or the affinity.
    """
    import torch

    if any(os.environ.get(name) for name in VARIABLES):
        return True
    machine = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    return torch.get_num_threads() not in {machine, affinity, machine // 2, affinity // 2, usable_cores()}


def threads_of(model: nn.Module | None = None) -> int:
    """How many threads this package runs ``model`` with on the CPU: what the user said, else what is `suitable`."""
    import torch

    running = torch.get_num_threads()
    return running if said() else min(running, suitable(model))


@contextmanager
def suited(model: nn.Module) -> Iterator[None]:
    """Inside the block torch has `threads_of` ``model``, after it as many as before."""
    import torch

    before, wanted = torch.get_num_threads(), threads_of(model)
    if wanted == before:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use_threads(count: int) -> None:
    """Run everything from here on with ``count`` threads, whatever is `suitable`.

    Like ``OMP_NUM_THREADS``, which it sets, too, so that processes started from here do alike.

    Raises:
        InputError: Below 1.
    """
    import torch

    from smi.runtime.checks import check_number

    check_number("count", count, low=1, integer=True)
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def limit_threads() -> None:
    """Give torch no more threads than there are `usable_cores`, unless the user has said how many."""
    import torch

    if not said():
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def choose_threads(model: nn.Module | None = None) -> None:
    """Set as many threads as suit ``model`` for the rest of the process, and print how many.

    A number that the user has said stays.

    Args:
        model: None stands for a small one, like those of the notebooks.
    """
    import torch

    if said():
        print(f"Threads: {torch.get_num_threads()}, as you have set it.")
        return
    count, cores = threads_of(model), usable_cores()
    torch.set_num_threads(count)
    why = "a small model gains little by more, and would wait for a busy machine" if count == 1 < cores else ""
    print(f"Threads: {count} of {cores} cores{f' ({why})' if why else ''}. OMP_NUM_THREADS sets another number.")
