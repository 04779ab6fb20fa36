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
        self._k = request.k
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
            native.perturb_vectors(
                theta, out[j], sizes, tensors, stds, self._family, model.counters(0, j), model.sign(j)
            )
        return model.with_shared(dict(zip(names, out.split(sizes.tolist(), dim=1), strict=True)))

    def weights(self, k: int) -> Folded:
        """Folded weights of draw k."""
        made = {}
        for step, dtype in self._layers:
            weight, bias = self.stacked(step, range(k, k + 1), dtype)
            made[step.output] = weight[0], None if bias is None else bias[0]
        return made

    def stacked(self, step: Layer, ks: range, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Folded weights ``[draws, O, ...]`` and biases ``[draws, O]`` of one layer in several draws.

        Those of a draw lie as a convolution reads them best, in channels_last order.
        """
        name = f"{step.module}.weight"
        theta, model = self._clean[name], self._perturbed
        rows, channels, *kernel = theta.shape
        out = torch.empty(len(ks), rows, *kernel, channels, dtype=dtype)
        scale, bias = (None if row is None else row.expand(self._k, -1) for row in self._rows[step.output])
        std = model.std(name)
        tensor = model.tensor_id(name) if std else 0
        for own, k in zip(out, ks, strict=True):
            own_scale = None if scale is None else scale[k]
            native.perturb_weight(theta, own, std, own_scale, self._family, model.counters(tensor, k), model.sign(k))
        order = (0, 1, 4, 2, 3) if kernel else (0, 1, 2)
        return out.permute(order), None if bias is None else bias[ks.start : ks.stop]
