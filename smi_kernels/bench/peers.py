"""What a user would write instead of `smi_kernels.stability_scores`, each in the versions worth trying.

A peer is a list of candidates. All compute the same scores; before anything is timed the fastest is chosen for each
model and number of images, so that no peer loses to us because it was set up badly. Only ``eager`` is what it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from smi_kernels.bench.compiled import FastForward, Step, compile_module, next_graph
from smi_kernels.bench.grouped import grouped_logits
from smi_kernels.bench.problem import Problem, Run, chunked, sum_kl
from smi_kernels.divergences import kl

DRAWS_AT_ONCE = (2, 8)
IMAGES_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One version of a peer: a label, the format of its model, and the function that sets it up."""

    label: str
    dtype: torch.dtype
    build: Callable[[Problem], Run]


def peers(problem: Problem, *, compiler: bool = True) -> dict[str, list[Candidate]]:
    """Name to candidates of all that compute scores. Without ``compiler`` nothing is compiled."""
    formats = list(dict.fromkeys([torch.float32, problem.low]))
    found = {"eager": [Candidate(label="eager", dtype=torch.float32, build=eager)]}
    if compiler:
        found["compiled"] = [
            Candidate(label=body, dtype=problem.low, build=partial(compiled_loop, body=body))
            for body in Step.bodies(problem.low)
        ]
    for name, build in [("vmap", stacked), ("grouped", grouped)]:
        found[name] = [
            Candidate(label=f"{draws} draws at once", dtype=dtype, build=partial(build, draws=draws, dtype=dtype))
            for dtype in formats
            for draws in DRAWS_AT_ONCE
        ]
    return found


def ceilings(problem: Problem, *, compiler: bool = True) -> list[Candidate]:
    """The unperturbed forward pass of K·N images, which no exact method can beat: no noise and no divergence."""
    parts = {"whole": 2**62, f"{IMAGES_AT_ONCE} images at once": IMAGES_AT_ONCE}
    found = [
        Candidate(label=f"eager, {label}", dtype=problem.low, build=partial(ceiling, part=part))
        for label, part in parts.items()
    ]
    if compiler:
        # On a GPU one graph is best, on a CPU what fits in the cache.
        label, part = list(parts.items())[0 if problem.images.is_cuda else 1]
        build = partial(ceiling, part=part, compiler=True)
        found.append(Candidate(label=f"compiled, {label}", dtype=problem.low, build=build))
    return found


def eager(problem: Problem) -> Run:
    """A loop over draws of ``functional_call`` in float32 (float64 for a float64 model)."""

    def run(k: int) -> Tensor:
        clean = problem.model(problem.images)
        total = torch.zeros_like(clean[:, 0])
        for draws in chunked(k, 1):
            state = {name: stack[0] for name, stack in problem.states(draws).items()}
            total += kl(clean, functional_call(problem.model, state, (problem.noisy_images(draws)[0],)))
        return total / k

    return run


def compiled_loop(problem: Problem, *, body: str, compiler: bool = True) -> Run:
    """A compiled loop, channels_last; a CUDA graph on a GPU.

    Noise, perturbation, forward pass and divergence of a draw are one graph. ``body`` is one of `Step.bodies`.
    """
    images = problem.images.contiguous(memory_format=torch.channels_last)
    forward, step = FastForward(problem), Step(problem, body)
    if compiler:
        forward, step = compile_module(forward, images.device, constant=True), compile_module(step, images.device)

    def run(k: int) -> Tensor:
        next_graph(images.device)
        clean = forward(images).clone()  # a CUDA graph reuses the memory of its outputs
        total = torch.zeros_like(clean[:, 0])
        for i in range(k):
            next_graph(images.device)
            total += step(images, clean, _given(problem, i))
        return total / k

    return run


def _given(problem: Problem, k: int) -> dict[str, Tensor] | None:
    """Noise of draw k for a test; None: the step draws its own, inside the graph."""
    if problem.draw is None:
        return None
    shapes = {name: p.shape for name, p in problem.parameters.items()} | {"": problem.images.shape[1:]}
    return {name: problem.noise(name, [k], shape)[0] for name, shape in shapes.items()}


def stacked(problem: Problem, *, draws: int, dtype: torch.dtype) -> Run:
    """``torch.func.vmap`` over stacked parameters, a few draws at once."""

    def one(state: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(problem.model, state, (images,))

    def run(k: int) -> Tensor:
        with problem.autocast(dtype):
            clean = problem.model(problem.images).to(problem.images.dtype)
        total = torch.zeros_like(clean[:, 0])
        for part in chunked(k, draws):
            state, images = problem.states(part), problem.noisy_images(part)
            with problem.autocast(dtype):
                logits = vmap(one)(state, images)
            total += sum_kl(clean, logits.to(clean.dtype))
        return total / k

    return run


def grouped(problem: Problem, *, draws: int, dtype: torch.dtype) -> Run:
    """Grouped convolution: the draws are groups, BatchNorm is folded; bfloat16 is channels_last."""
    alone = {name: p[None] for name, p in problem.parameters.items()}

    def run(k: int) -> Tensor:
        clean = grouped_logits(problem.model, alone, problem.images[None], dtype)[0]
        total = torch.zeros_like(clean[:, 0])
        for part in chunked(k, draws):
            logits = grouped_logits(problem.model, problem.states(part), problem.noisy_images(part), dtype)
            total += sum_kl(clean, logits)
        return total / k

    return run


def ceiling(problem: Problem, *, part: int, compiler: bool = False) -> Run:
    """Logits of K·N unperturbed images, ``part`` of them at once, BatchNorm folded."""
    forward = FastForward(problem)
    if compiler:
        forward = compile_module(forward, problem.images.device, constant=True)
    batches: dict[int, tuple[Tensor, ...]] = {}

    def run(k: int) -> Tensor:
        if k not in batches:  # at warm-up, outside the time
            batch = problem.images.repeat(k, 1, 1, 1)
            batches[k] = batch.contiguous(memory_format=torch.channels_last).split(min(part, len(batch)))
        next_graph(problem.images.device)
        logits = [forward(batch) for batch in batches[k]]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    return run
