"""Folded weights of any draw on a CPU, written by one pass in C from noise to bfloat16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from smi_kernels import native
from smi_kernels.folding import fold
from smi_kernels.noise import INDEPENDENT
from smi_kernels.perturbed import PerturbedModel
from smi_kernels.plan import Layer, Plan
from smi_kernels.request import Request

Folded = dict[str, tuple[Tensor, Tensor | None]]
"""Layer, by the name of its output, to folded weight and bias, in the format that the layer runs in."""


def prepares(request: Request) -> bool:
    """Whether the C library can make the weights that a request needs."""
    return (
        request.images.device.type == "cpu"
        and request.dtype in (torch.float32, torch.bfloat16)
        and request.family.structure == INDEPENDENT
        and request.family.native is not None
        and native.library() is not None
    )


class Prepared:
    """Scales and biases of all draws (they are small), and weights of one draw when it is asked for.

    Args:
        modules: of the model, by name.
        plan: its plan.
        perturbed: its parameters and their noise.
        request: for which `prepares` holds.
        layer_dtype: the format in which a layer multiplies.
    """

    def __init__(
        self, modules: dict[str, nn.Module], plan: Plan, perturbed: PerturbedModel, request: Request,
        layer_dtype: Callable[[Layer], torch.dtype],
    ) -> None:  # fmt: skip
        self._perturbed, self._family = perturbed, str(request.family.native)
        self._clean = perturbed.with_shared(perturbed.clean)
        self._layers = [(step, layer_dtype(step)) for step, _ in plan.steps if isinstance(step, Layer)]
        state = self._clean | self._vectors(request.k)
        self._rows = {
            step.output: fold(step, modules[step.norm] if step.norm is not None else None, state)
            for step, _ in self._layers
        }

    def _vectors(self, k: int) -> dict[str, Tensor]:
        """Perturbed parameters of one dimension under all draws, ``[K, rows]``."""
        model = self._perturbed
        names = [name for name in model.names if model.clean[name].ndim == 1]
        if not names:
            return {}
        sizes = torch.tensor([model.clean[name].numel() for name in names])
        tensors = torch.tensor([model.tensor_id(name) for name in names], dtype=torch.int32)
        stds = torch.tensor([model.std(name) for name in names])
        theta = torch.cat([model.clean[name] for name in names])
        out = torch.empty(k, len(theta))
        for j in range(k):
            native.perturb_vectors(theta, out[j], sizes, tensors, stds, self._family, model.counters(0, j), model.sign(j))
        return model.with_shared(dict(zip(names, out.split(sizes.tolist(), dim=1), strict=True)))

    def weights(self, k: int) -> Folded:
        """Folded weights of draw k."""
        return {step.output: self._layer(step, dtype, k) for step, dtype in self._layers}

    def _layer(self, step: Layer, dtype: torch.dtype, k: int) -> tuple[Tensor, Tensor | None]:
        name = f"{step.module}.weight"
        theta, model = self._clean[name], self._perturbed
        scale, bias = (row if row is None or row.ndim == 1 else row[k] for row in self._rows[step.output])
        memory = torch.channels_last if theta.ndim == 4 else torch.contiguous_format
        out = torch.empty_like(theta, dtype=dtype, memory_format=memory)
        std = model.std(name)
        counters = model.counters(model.tensor_id(name) if std else 0, k)
        native.perturb_weight(theta, out, std, scale, self._family, counters, model.sign(k))
        return out, bias
