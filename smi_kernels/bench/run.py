"""The grid: what is set up for a model and a number of images, and what is measured at each number of draws."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from smi_kernels.bench.measure import CHECKED, Ours, Tuned, Unavailable, interleaved, median_and_spread, peak_bytes
from smi_kernels.bench.models import make_images, make_model
from smi_kernels.bench.peers import ceilings, peers
from smi_kernels.bench.problem import Problem, Run
from smi_kernels.bench.records import CEILING, OURS, Record, fill_ratios
from smi_kernels.noise import families
from smi_kernels.precision import has_bfloat16, resolve_dtype

SIGMA_X, SIGMA_W = 0.05, 0.05


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to measure."""

    models: Sequence[str]
    n: Sequence[int]
    k: Sequence[int]
    repeats: int
    device: torch.device
    compiler: bool = True


@dataclass
class Notes:
    """What a reader should know besides: peers that did not run, and which candidates were chosen."""

    unavailable: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Variant:
    name: str
    family: str | None
    dtype: torch.dtype
    run: Run


def our_families() -> list[str]:
    """The families that are timed, of those that there are."""
    return [name for name in ("gaussian", "rademacher", "rank1", "flipout") if name in families]


def measure(grid: Grid, notes: Notes, step: Callable[[str], object] = lambda what: None) -> Iterator[list[Record]]:
    """Measure point by point; yields the records of each. ``step`` is called with what comes next, for progress."""
    for model in grid.models:
        whole = _problem(model, max(grid.n), grid.device)
        references: dict[tuple[str, int], Tensor | None] = {}
        for n in grid.n:
            problem = replace(whole, images=whole.images[:n])
            step(f"{model}, N={n}: compiling and tuning")
            tuned = _tuned(problem, grid)
            for k in grid.k:
                name = f"{model}, N={n}, K={k}"
                step(f"{name}: tuning")
                variants = _variants(problem, tuned, k, name, notes)
                step(name)
                point = _timed(variants, model, n, k, grid, step)
                for variant, record in zip(variants, point, strict=True):
                    if isinstance(variant.run, Ours):
                        key = (variant.run.family, k)
                        if key not in references:
                            step(f"{name}: reference")
                            references[key] = Ours(_first(whole), variant.run.family).reference(k)
                        record["error"] = variant.run.error(k, references[key])
                fill_ratios(point)
                yield point
            del tuned
            _forget()


def _problem(model: str, n: int, device: torch.device) -> Problem:
    return Problem(
        model=make_model(model).to(device),
        images=make_images(model, n).to(device),
        sigma_x=SIGMA_X,
        sigma_w=SIGMA_W,
        low=torch.bfloat16 if has_bfloat16(device) else torch.float32,
    )


def _first(problem: Problem) -> Problem:
    return replace(problem, images=problem.images[:CHECKED])


def _tuned(problem: Problem, grid: Grid) -> dict[str, Tuned]:
    found = {name: Tuned(problem, some) for name, some in peers(problem, compiler=grid.compiler).items()}
    # Other than a peer's, the best version of the ceiling depends on K: its batch is K·N images.
    return found | {CEILING: Tuned(problem, ceilings(problem, compiler=grid.compiler), limit=None)}


def _variants(problem: Problem, tuned: dict[str, Tuned], k: int, point: str, notes: Notes) -> list[_Variant]:
    dtype = resolve_dtype("auto", problem.model, problem.images)
    variants = [_Variant(OURS, family, dtype, Ours(problem, family)) for family in our_families()]
    for name, peer in tuned.items():
        try:
            candidate, run = peer.best(k)
        except Unavailable as reason:
            notes.unavailable[f"{name}, {point}"] = str(reason)
            continue
        notes.chosen[f"{name}, {point}"] = candidate.label
        variants.append(_Variant(name, None if name == CEILING else "gaussian", candidate.dtype, run))
    return variants


def _timed(
    variants: list[_Variant], model: str, n: int, k: int, grid: Grid, step: Callable[[str], object]
) -> list[Record]:
    calls = {f"{v.name} {v.family}": partial(v.run, k) for v in variants}
    times = interleaved(calls, grid.repeats, grid.device, lambda: step(""))
    records = []
    for variant, (label, call) in zip(variants, calls.items(), strict=True):
        middle, spread = median_and_spread(times[label])
        record = Record(
            model=model, n=n, k=k, family=variant.family, variant=variant.name,
            dtype=str(variant.dtype).removeprefix("torch."),
            seconds=middle, spread=spread, peak_bytes=peak_bytes(call, grid.device),
            error=None, vs_eager=None, vs_best_peer=None, of_ceiling=None,
        )  # fmt: skip
        records.append(record)
    return records


def _forget() -> None:
    """Drop what was compiled, so that no limit on recompilations is met and no memory piles up."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
