"""Several draws in one forward pass: a few images do not fill a machine, and calls on little data cost more than it.

Draws are run in groups whose values fit into a core's cache, so that memory does not grow with K. How a layer applies
the weights of a group depends on the noise: see `shared` and `grouped`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_kernels.backends.loop import divergences_of_draws, input_noise
from smi_kernels.plan import Call, Layer, reads_of
from smi_kernels.reductions import reductions
from smi_kernels.request import Request, check_logits

if TYPE_CHECKING:
    from smi_kernels.backends.torch import Runner

VALUES = 1 << 22
"""Elements of the largest value of a group, 8 MB in bfloat16; measured on two cores that share a cache of 32 MB."""

GROUP = 8
"""Draws in a group; laying fewer side by side was measured to cost more than it saves, more would take more memory."""


_BY_CHANNEL = {
    nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Dropout, nn.Dropout2d, nn.Identity, nn.MaxPool2d, nn.ReLU, nn.ReLU6, nn.SiLU,
    F.adaptive_avg_pool2d, F.avg_pool2d, F.max_pool2d, F.relu, F.relu6, F.silu, torch.relu,
}  # fmt: skip
"""Calls that treat channels alike and apart, so that they need not know that those are of several draws."""


@dataclass(frozen=True)
class Stacked:
    """A value of several draws side by side in the channels: ``[N, draws·C, H, W]``, channels_last."""

    tensor: Tensor
    draws: int

    def apart(self) -> Tensor:
        """``[draws·N, C, H, W]``."""
        split = self.tensor.unflatten(1, (self.draws, -1)).permute(1, 0, 2, 3, 4)
        return split.flatten(0, 1).contiguous(memory_format=torch.channels_last)


class RunLayer(Protocol):
    """Applies a layer under the weights of draws ``ks`` to ``[draws·N, ...]`` or `Stacked` values."""

    def __call__(self, runner: Runner, step: Layer, ks: range, x: Any, residual: Any) -> Any:
        """The layer's value, in either form."""


def group_size(runner: Runner, request: Request) -> int:
    """Draws to run at once; 1 if the draws are to be run one by one."""
    if request.images.requires_grad and torch.is_grad_enabled():
        return 1
    if not runner.has_noise and request.sigma_x == 0:
        return 1
    if runner.plan.reads_parameters or not runner.plan.by_image or request.images.device.type != "cpu":
        return 1
    if len(request.images) > request.chunk:
        return 1
    group = min(request.k, GROUP)
    return group if group * len(request.images) * runner.plan.largest <= VALUES else 1


@torch.no_grad()
def scores(runner: Runner, request: Request, group: int, run_layer: RunLayer) -> Tensor:
    """Scores ``[N]``, or ``[N, K]`` if the request wants no reduction, in the working dtype."""
    images = request.images.detach().to(request.working_dtype).contiguous()
    clean = runner.logits(images, runner.weights(None), perturbed=False)
    groups = [range(first, min(first + group, request.k)) for first in range(0, request.k, group)]
    noisy = torch.cat([_logits(runner, request, images, ks, run_layer) for ks in groups])
    return reductions[request.reduce](divergences_of_draws(clean, noisy, request))


def _logits(runner: Runner, request: Request, images: Tensor, ks: range, run_layer: RunLayer) -> Tensor:
    """Logits ``[draws, N, C]`` of a group of draws."""
    batch = images.expand(len(ks), *images.shape)
    if request.sigma_x > 0:
        deltas = torch.stack([delta for k in ks if (delta := input_noise(request, k)) is not None])
        batch = (images + deltas[:, None]).clamp_(0, 1)
    state = runner.perturbed.with_shared(runner.perturbed.clean)

    def layer(step: Layer, x: Any, residual: Any) -> Any:
        return run_layer(runner, step, ks, x, residual)

    def call(step: Call, values: Mapping[str, Any]) -> Any:
        read = {name: values[name] for name in reads_of(step)}
        if runner.meaning(step) in _BY_CHANNEL and len(read) == 1:
            ((name, value),) = read.items()
            if isinstance(value, Stacked):
                made = runner.run_call(step, {name: value.tensor}, state)
                if isinstance(made, Tensor):  # pooling may give indices besides
                    return Stacked(made, value.draws)
        return runner.run_call(step, {name: apart(value) for name, value in read.items()}, state)

    batch = batch.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, enabled=False):
        logits = apart(runner.plan.run(batch, layer, call))
    check_logits(logits, request, len(batch), perturbed=True)
    return logits.to(request.working_dtype).unflatten(0, (len(ks), len(images)))


def apart(value: Any) -> Any:
    """A value as a call of the model expects it."""
    return value.apart() if isinstance(value, Stacked) else value
