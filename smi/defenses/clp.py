"""Channel Lipschitz Pruning (Zheng et al., "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022).

A trigger is a small change of the image to which a backdoor's channels respond strongly. An upper bound of a channel's
Lipschitz constant takes no data: ``σ₁(W_c) · |γ_c| / √(v_c + ε)``, the spectral norm of its kernel as a matrix
``[inputs, kh·kw]``, times the slope of its BatchNorm. In each layer, channels above ``mean + u · std`` of the layer's
bounds are pruned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smi.defenses.base import Defense, Repair, defenses
from smi.defenses.channels import Layer, conv_layers, prune, pruned_share
from smi.domains.base import PublicImages, Samples
from smi.errors import InputError
from smi.runtime.checks import check_number
from smi.runtime.compute import unfrozen
from smi.runtime.job import Job


@defenses.register("clp")
@dataclass(frozen=True, kw_only=True)
class CLP(Defense):
    """Channel Lipschitz pruning: needs no samples and trains nothing.

    Samples, if given, only serve to run the model once, to see which BatchNorm belongs to which convolution.

    Attributes:
        u: Deviations above a layer's mean from which a channel is pruned. One of n values is never more than
            ``(n − 1) / √n`` deviations above their mean, so that with u = 3 layers of ten channels and fewer are left
            as they are.
    """

    u: float = 3.0

    name = "clp"
    needs_samples = False

    def __post_init__(self) -> None:
        check_number("u", self.u, low=0)

    def _repair(self, model: nn.Module, samples: Samples | None, public: PublicImages | None, job: Job) -> Repair:
        pruned: dict[str, list[int]] = {}
        layers = conv_layers(model, None if samples is None else samples.images)
        repaired = unfrozen(model)
        for layer in layers:
            bounds = lipschitz_bounds(repaired, layer)
            if len(bounds) > 1:
                chosen = (bounds > bounds.mean() + self.u * bounds.std()).nonzero()[:, 0]
                prune(repaired, layer, chosen)
                pruned[layer.output] = chosen.tolist()
        log = {"pruned": pruned, "pruned_share": pruned_share(pruned, layers)}
        return Repair(repaired, self.name, "none" if samples is None else samples.source, self.settings(), log)


@torch.no_grad()
def lipschitz_bounds(model: nn.Module, layer: Layer) -> Tensor:
    """Upper bound of the Lipschitz constant of each channel of ``layer``: float64 ``[channels]``, 0 or more."""
    kernel = model.get_submodule(layer.conv).weight
    norm = None if layer.norm is None else model.get_submodule(layer.norm)
    scale = torch.ones((), dtype=torch.float64)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        if norm.running_var is None:
            raise InputError(f"{layer.norm!r} keeps no statistics, so that its slope depends on the batch.")
        slope = 1.0 if norm.weight is None else norm.weight.cpu().double().abs()
        scale = slope / (norm.running_var.cpu().double() + norm.eps).sqrt()
    if not isinstance(kernel, Tensor) or not kernel.isfinite().all() or not torch.as_tensor(scale).isfinite().all():
        raise InputError(f"{layer.conv!r} has NaN or infinite weights. Load an intact checkpoint.")
    return torch.linalg.matrix_norm(kernel.cpu().double().flatten(2), ord=2) * scale
