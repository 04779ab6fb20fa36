"""DeepInversion (Yin et al., "Dreaming to Distill", CVPR 2020), a baseline: pixels held to the BatchNorm statistics.

A trained BatchNorm layer remembers mean and variance of its input over the training images. Images whose statistics
are the same look more like those than what the classes alone would give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.errors import InputError
from smi.inversion.base import Task, inversions
from smi.inversion.pixel import Pixel, total_variation
from smi.runtime.checks import check_number


@inversions.register("deepinversion")
@dataclass(frozen=True, kw_only=True)
class DeepInversion(Pixel):
    """``CE(f(x), y) + lambda_tv · TV(x) + lambda_l2 · ‖x‖²/P + lambda_bn · Σ_l (‖μ_l(x) − μ̂_l‖ + ‖σ²_l(x) − σ̂²_l‖)``.

    μ_l and σ²_l are the mean and variance of BatchNorm l's input by channel, over a batch of all classes; μ̂_l and
    σ̂²_l are what that layer remembers; P is the number of pixels of an image.

    Raises:
        InputError: For a model without such layers.
    """

    steps: int = 200
    lr: float = 0.2
    lambda_tv: float = 0.5
    lambda_l2: float = 0.0
    lambda_bn: float = 1.0

    name = "deepinversion"
    joint = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lambda_l2", self.lambda_l2, low=0)
        check_number("lambda_bn", self.lambda_bn, low=0)

    def objective(self, images: Tensor, variable: Tensor, task: Task) -> Tensor:
        """Identity, smoothness, size and statistics."""
        with statistics_gap(task.model) as gaps:
            loss = F.cross_entropy(task.run(images), task.labels)
        loss = loss + self.lambda_tv * total_variation(images).mean() + self.lambda_l2 * images.square().mean()
        return loss + self.lambda_bn * torch.stack(gaps).sum()


@contextmanager
def statistics_gap(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list that each forward pass adds to: for each BatchNorm layer, how far its input is from its memory."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    if not norms:
        raise InputError(
            "DeepInversion needs BatchNorm layers with running statistics, and the model has none. Try smi.Pixel()."
        )
    gaps: list[Tensor] = []

    def compare(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        x = inputs[0].float()
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        gaps.append((mean - module.running_mean).norm() + (variance - module.running_var).norm())

    hooks = [norm.register_forward_pre_hook(compare) for norm in norms]
    try:
        yield gaps
    finally:
        for hook in hooks:
            hook.remove()
