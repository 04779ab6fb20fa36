"""Trojan watermark (Liu et al., "Trojaning Attack on Neural Networks", NDSS 2018)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from smi.attacks.base import Attack, attacks
from smi.attacks.optimised import Surrogate, descend
from smi.domains.base import PrivateSet
from smi.errors import InputError
from smi.runtime.checks import check_number
from smi.runtime.seeding import stream

STARTS = 8  # random patterns that are optimised side by side; the best one is the trigger


@attacks.register("trojan_watermark")
@dataclass(frozen=True, kw_only=True)
class TrojanWatermark(Attack):
    """A see-through ring with a cross in it whose colours excite one neuron: ``x' = x(1 − m·a) + pattern·m·a``.

    ``max_pattern A_n(x')`` on a blank (black) image, as in the paper. n is a neuron of the penultimate layer: the one
    with the largest sum of absolute weights, of those that the watermark reaches. The paper sums the weights from the
    layer before; behind a BatchNorm these have no scale, so it is the weights into the logits here.

    Attributes:
        size: Diameter of the ring as a share of the shorter side.
        opacity: a.
        steps: Gradient steps that `fit` takes.
    """

    size: float = 0.8
    opacity: float = 0.3
    steps: int = 200

    needs_surrogate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("size", self.size, low=0.1, high=1)
        check_number("opacity", self.opacity, low=0.01, high=1)
        check_number("steps", self.steps, low=1, integer=True)

    def stamp(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in [0, 1] with the watermark."""
        return self._blend(images, self._tensor("pattern", images).to(images))

    def fit(self, data: PrivateSet, surrogate: nn.Module | None = None, *, seed: int = 0) -> Self:
        """The attack with its pattern ``[C, H, W]`` in [0, 1] optimised; of ``data`` only the shape matters."""
        seen, rng = Surrogate(surrogate, data.images, data.num_classes), stream(seed, "trigger")
        blank = torch.zeros_like(data.images[:1])
        start = torch.rand(STARTS, *blank.shape[1:], generator=rng)
        neuron = self._neuron(seen, self._blend(blank, start))

        def excitation(pattern: Tensor) -> Tensor:
            return seen(self._blend(blank, pattern))[0][:, neuron]

        patterns = descend(
            start,
            lambda pattern, _: -excitation(pattern).sum(),
            lambda pattern, _: pattern.clamp(0, 1),
            blank,
            steps=self.steps,
            lr=0.05,
            rng=rng,
        )
        with torch.no_grad():
            best = patterns[excitation(patterns).argmax()]
        # Outside the shape the pattern is never seen: zero keeps what is stored, and shown, to the watermark.
        return replace(self, fitted={"pattern": best * (watermark(blank, self.size) > 0)})

    def _blend(self, images: Tensor, pattern: Tensor) -> Tensor:
        field = self.opacity * watermark(images, self.size)
        return images * (1 - field) + pattern * field

    @staticmethod
    def _neuron(surrogate: Surrogate, marked: Tensor) -> int:
        """The neuron with the largest sum of absolute weights into the logits, of those that patterns change."""
        with torch.no_grad():
            reached = surrogate(marked)[0].std(0) > 0
        if not reached.any():
            raise InputError("No neuron of the surrogate responds to the watermark. Try a larger size or opacity.")
        strength = surrogate.head.weight.abs().sum(0).cpu()
        return int(strength.masked_fill(~reached, -1).argmax())


def watermark(images: Tensor, size: float) -> Tensor:
    """The shape for images ``[N, C, H, W]``: ``[H, W]`` in [0, 1] with soft edges, a ring with a diagonal cross in it.

    Args:
        images: Whose height and width it has.
        size: The ring's diameter as a share of the shorter side.
    """
    height, width = images.shape[2:]
    y = torch.arange(height).to(images)[:, None] - (height - 1) / 2
    x = torch.arange(width).to(images)[None] - (width - 1) / 2
    distance, thickness = (x.square() + y.square()).sqrt(), max(1.0, 0.06 * min(height, width))
    radius = (size * min(height, width) - thickness) / 2
    ring = (distance - radius).abs()
    cross = torch.minimum((x - y).abs(), (x + y).abs()) / 2**0.5 + (distance - radius).clamp(min=0)
    return (thickness / 2 + 0.5 - torch.minimum(ring, cross)).clamp(0, 1)
