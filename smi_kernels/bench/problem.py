"""What a peer is given to score, and the noise that it draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from smi_kernels.bench.models import Normalised
from smi_kernels.divergences import kl
from smi_kernels.noise.perturbed_model import root_mean_square

Run = Callable[[int], Tensor]
"""From the number of draws K to scores ``[N]``. What it holds was set up before, outside the time."""

Draw = Callable[[str, Sequence[int], Sequence[int]], Tensor]
"""From a parameter's name ("" for the image), the draws and a shape to unit noise ``[draws, *shape]``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Score ``images`` by KL divergence under Gaussian noise on image and parameters.

    Attributes:
        model: in eval mode.
        images: ``[N, C, H, W]`` in [0, 1].
        sigma_x: of the noise on pixels.
        sigma_w: of the noise on each parameter tensor, relative to its root mean square.
        low: the fastest format of the hardware: bfloat16, or float32.
        draw: where noise comes from, for tests. None: ``torch.randn``.
    """

    model: Normalised
    images: Tensor
    sigma_x: float
    sigma_w: float
    low: torch.dtype = torch.float32
    draw: Draw | None = None

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """θ by name."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    @cached_property
    def std(self) -> dict[str, float]:
        """σ_w ‖θ_l‖ / √n_l by name."""
        return {name: self.sigma_w * root_mean_square(p) for name, p in self.parameters.items()}

    def noise(self, name: str, draws: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Unit noise ``[draws, *shape]`` for a parameter, or the image if the name is empty."""
        if self.draw is None:
            return torch.randn((len(draws), *shape), device=self.images.device, dtype=self.images.dtype)
        return self.draw(name, draws, shape).to(self.images)

    def states(self, draws: Sequence[int]) -> dict[str, Tensor]:
        """θ + v_k for several draws, each ``[draws, *shape]``."""
        return {
            name: torch.add(p, self.noise(name, draws, p.shape), alpha=self.std[name])
            for name, p in self.parameters.items()
        }

    def noisy_images(self, draws: Sequence[int]) -> Tensor:
        """clamp(x + δ_k) for several draws, ``[draws, N, C, H, W]``; δ_k is shared by the images."""
        delta = self.noise("", draws, self.images.shape[1:])
        return (self.images + self.sigma_x * delta[:, None]).clamp(0, 1)

    def autocast(self, dtype: torch.dtype) -> AbstractContextManager[object]:
        """Autocast to bfloat16, or nothing for another format."""
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def sum_kl(clean: Tensor, perturbed: Tensor) -> Tensor:
    """Sum over draws of KL(clean ‖ perturbed), ``[N]``, from ``[N, C]`` and ``[draws, N, C]``."""
    draws, n, _ = perturbed.shape
    return kl(clean.repeat(draws, 1), perturbed.flatten(0, 1)).view(draws, n).sum(0)


def chunked(k: int, size: int) -> list[Sequence[int]]:
    """The draws 0 … k − 1 in groups of ``size``."""
    return [range(start, min(start + size, k)) for start in range(0, k, size)]
