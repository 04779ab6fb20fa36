"""Timing, peak memory and error. See ``results/README.md`` for how to read the numbers."""

from __future__ import annotations

import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi_kernels.backends import backends
from smi_kernels.bench.peers import Candidate
from smi_kernels.bench.problem import Problem, Run
from smi_kernels.errors import InputError
from smi_kernels.scores import stability_scores

WARM_UP = 3
"""Calls before anything is timed on a GPU: a CUDA graph compiles, records, then replays. On a CPU one is enough."""

TUNING_DRAWS = 8
CHECKED = 64
FLOOR = 1e-4


class Unavailable(Exception):
    """A peer that does not run here; the message says why."""


@dataclass
class Tuned:
    """A peer: those of its candidates that run, and the fastest of them for each number of draws.

    problem, candidates: what to set up. limit: draws beyond which the choice is not made again.
    """

    problem: Problem
    candidates: list[Candidate]
    limit: int | None = TUNING_DRAWS
    _runs: list[tuple[Candidate, Run]] | None = None
    _chosen: dict[int, tuple[Candidate, Run]] = field(default_factory=dict)

    def best(self, k: int) -> tuple[Candidate, Run]:
        """The fastest candidate, warmed up. Raises `Unavailable` if none runs."""
        k = k if self.limit is None else min(k, self.limit)
        if self._runs is None:
            self._runs = self._prepared(k)
        if k not in self._chosen:
            times: list[float] = []
            for _, run in self._runs:
                times.append(self._seconds(run, k, min(times, default=math.inf)))
            self._chosen[k] = self._runs[times.index(min(times))]
        return self._chosen[k]

    def _prepared(self, k: int) -> list[tuple[Candidate, Run]]:
        runs, reason = [], ""
        for candidate in self.candidates:
            try:
                run = candidate.build(self.problem)
                run(k if self.limit is None else 1)
            # A compiler raises whatever it likes. One that fails here is told to the reader, and the rest goes on.
            except Exception as error:
                reason = _first_line(error)
            else:
                runs.append((candidate, run))
        if not runs:
            raise Unavailable(reason)
        return runs

    def _seconds(self, run: Run, k: int, best: float) -> float:
        """The faster of two calls; of one, where that is long enough to tell that the candidate is not the best."""
        if len(self.candidates) == 1:
            return 0.0
        device = self.problem.images.device
        if device.type == "cuda":
            warm_up(lambda: run(k), device)
        first = seconds(lambda: run(k), device)
        if first > max(1.0, 1.5 * best):
            return first
        return min(first, seconds(lambda: run(k), device))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def warm_up(call: Callable[[], object], device: torch.device) -> None:
    """Call until what happens only at first has happened."""
    for _ in range(WARM_UP if device.type == "cuda" else 1):
        call()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, until its result is there."""
    _wait(device)
    start = time.perf_counter()
    result = call()
    _wait(device)
    elapsed = time.perf_counter() - start
    del result  # after the time, whatever it costs
    return elapsed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    step: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call in each of ``repeats`` rounds, after a warm-up.

    In a round every call runs once, so that a machine that slows down slows all of them; the round after starts one
    further on, so that none always follows the same other. ``step`` is called after each, for a progress bar.
    """
    names = list(calls)
    for name in names:
        warm_up(calls[name], device)
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(repeats):
        gc.collect()
        gc.disable()
        try:
            for i in range(len(names)):
                name = names[(i + r) % len(names)]
                times[name].append(seconds(calls[name], device))
                step()
        finally:
            gc.enable()
    return times


def median_and_spread(times: list[float]) -> tuple[float, float]:
    """Median, and interquartile range / median."""
    values = torch.tensor(times, dtype=torch.float64)
    low, middle, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return middle, (high - low) / middle


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Most memory that tensors take at once during a call, above what they took before it.

    What a peer keeps between calls (its weights, the pool of a CUDA graph) is not in it, nor is scratch that a library
    allocates on its own. On a GPU torch counts; on a CPU it is summed from the allocations that torch's profiler saw.
    """
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of every start, and of GPUs that are not there
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        return peak_of_trace(json.loads(file.read_text()))


def peak_of_trace(trace: Mapping[str, list[dict[str, Any]]]) -> int:
    """The largest running sum of the allocations (positive) and releases (negative) in a trace."""
    events = [e for e in trace["traceEvents"] if e.get("name") == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak


class Ours:
    """`stability_scores` as a user calls it, and its error against float64 with the same noise."""

    def __init__(self, problem: Problem, family: str, *, seed: int = 0) -> None:
        self.problem, self.family = problem, family
        self._seed = self._first = seed

    def __call__(self, k: int) -> Tensor:
        """Scores; every call has another seed, so that nothing can be kept from the last."""
        self._seed += 1
        return self._scores(len(self.problem.images), k, self._seed)

    def reference(self, k: int) -> Tensor | None:
        """Float64 scores of the first `CHECKED` images; None if the reference does not know the family."""
        name = "reference" if "reference" in backends else "torch"
        try:
            return self._scores(CHECKED, k, self._first, dtype="float64", backend=name)
        except InputError:
            return None

    def error(self, k: int, reference: Tensor | None) -> float | None:
        """`max_error` of the scores of all images, where the reference has them."""
        if reference is None:
            return None
        return max_error(self._scores(len(self.problem.images), k, self._first), reference)

    def _scores(self, n: int, k: int, seed: int, **options: str) -> Tensor:
        problem = self.problem
        return stability_scores(
            problem.model,
            problem.images[:n],
            k=k,
            sigma_x=problem.sigma_x,
            sigma_w=problem.sigma_w,
            family=self.family,
            seed=seed,
            **options,  # type: ignore[arg-type]
        )


def max_error(scores: Tensor, reference: Tensor) -> float:
    """max |s − r| / (r + 1e-4) over the images that both have, the first ones."""
    n = min(len(scores), len(reference))
    exact = reference[:n].double()
    return ((scores[:n].double() - exact).abs() / (exact + FLOOR)).max().item()
