"""Several draws in one forward pass: a few images do not fill a machine, and calls on little data cost more than it.

Draws are run in groups whose values fit into a cache, so that memory does not grow with K. How a layer applies the
weights of a group depends on the noise: see `fused` and `shared`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from smi_kernels.backends.loop import divergences_of_draws, input_noise
from smi_kernels.graph.plan import Call, Layer
from smi_kernels.request import Request, check_logits

if TYPE_CHECKING:
    from smi_kernels.backends.torch import Runner

VALUES = 1 << 22
"""Elements of the largest value of a group, 8 MB in bfloat16; measured on two cores that share a cache of 32 MB."""

GROUP = 9
"""Most draws in a group, eight and the one without noise: their weights take memory too."""


class RunLayer(Protocol):
    """Applies a layer under the weights of draws ``ks``, None being no noise, to ``[draws·N, ...]`` values."""

    def __call__(
        self, runner: Runner, step: Layer, ks: Sequence[int | None], x: Tensor, residual: Tensor | None
    ) -> Tensor:
        """The layer's value, ``[draws·N, ...]``."""


def runs(runner: Runner, request: Request) -> bool:
    """Whether draws can share a forward pass: what is not a layer must treat every image alike and alone."""
    quiet = not runner.has_noise and request.sigma_x == 0
    return (
        not quiet and runner.plan.by_image and not runner.plan.reads_parameters and request.images.device.type == "cpu"
    )


@torch.no_grad()
def divergences(runner: Runner, request: Request, run_layer: RunLayer) -> Tensor:
    """Divergence of each image under each draw, ``[N, K]``, in the working dtype."""
    _keep_freed_memory()
    images = request.images.detach().to(request.working_dtype).contiguous()
    parts = images.split(request.chunk)
    size = max(1, min(GROUP, VALUES // (len(parts[0]) * runner.plan.largest), VALUES // runner.largest_weight))
    ks: list[int | None] = [None, *range(request.k)]
    groups = -(-len(ks) // size)
    bounds = [len(ks) * i // groups for i in range(groups + 1)]
    logits = [_logits(runner, request, parts, ks[start:end], run_layer) for start, end in itertools.pairwise(bounds)]
    clean, noisy = torch.cat(logits).split([1, request.k])
    return divergences_of_draws(clean[0], noisy, request)


def _logits(
    runner: Runner, request: Request, parts: Sequence[Tensor], ks: Sequence[int | None], run_layer: RunLayer
) -> Tensor:
    """Logits ``[draws, N, C]`` of a group of draws."""
    shift = _shift(request, ks)
    state = runner.perturbed.with_shared(runner.perturbed.clean)

    def layer(step: Layer, x: Tensor, residual: Tensor | None) -> Tensor:
        return run_layer(runner, step, ks, x, residual)

    def call(step: Call, values: Mapping[str, Any]) -> Any:
        return runner.run_call(step, values, state)

    made = []
    for part in parts:
        batch = part.expand(len(ks), *part.shape) if shift is None else (part + shift).clamp_(0, 1)
        with torch.autocast("cpu", enabled=False):
            logits = runner.plan.run(batch.flatten(0, 1), layer, call)
        if ks[0] is None:
            check_logits(logits[: len(part)], request, len(part), perturbed=False)
        check_logits(logits, request, len(ks) * len(part), perturbed=True)
        made.append(logits.to(request.working_dtype).unflatten(0, (len(ks), len(part))))
    return torch.cat(made, 1)


def _shift(request: Request, ks: Sequence[int | None]) -> Tensor | None:
    """Noise on the image ``[draws, 1, C, H, W]``, 0 for a draw without noise."""
    if request.sigma_x == 0:
        return None
    shift = torch.zeros(len(ks), *request.images.shape[1:], dtype=request.working_dtype)
    for own, k in zip(shift, ks, strict=True):
        if k is not None:
            own.copy_(input_noise(request, k))
    return shift[:, None]


@functools.cache
def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: it gives back blocks of 128 KB at once, until one of up to 32 MB was freed.

    Getting such blocks from the system for every layer was measured to take up to a third of the time.
    """
    torch.empty((1 << 25) - (1 << 13), dtype=torch.uint8)
