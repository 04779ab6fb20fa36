"""Folded weights of any draw on a CPU; of a family with noise in C, written by one pass from noise to bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from smi_kernels import native
from smi_kernels.graph.folding import fold
from smi_kernels.graph.plan import Layer, Plan
from smi_kernels.noise import INDEPENDENT
from smi_kernels.noise.perturbed_model import PerturbedModel
from smi_kernels.request import Request

Folded = dict[str, tuple[Tensor, Tensor | None]]
"""Layer, by the name of its output, to folded weight and bias, in the format that the layer runs in."""


def prepares(request: Request) -> bool:
    """Whether weights for a request can be made here."""
    return (
        request.images.device.type == "cpu"
        and request.dtype in (torch.float32, torch.bfloat16)
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
        in_c = request.family.structure == INDEPENDENT
        self._perturbed, self._family = perturbed, request.family.native if in_c else None
        self._clean = perturbed.with_shared(perturbed.clean)
        self._layers = [(step, layer_dtype(step)) for step, _ in plan.steps if isinstance(step, Layer)]
        self._kept: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._kept_draws: list[int | None] = []
        state = self._clean | self._vectors(request.k)
        self._rows = {
            step.output: fold(step, modules[step.norm] if step.norm is not None else None, state)
            for step, _ in self._layers
        }

    def _vectors(self, k: int) -> dict[str, Tensor]:
        """Parameters of one dimension without noise and under all draws, ``[1 + K, rows]``."""
        model = self._perturbed
        names = [name for name in model.names if model.clean[name].ndim == 1]
        if not names:
            return {}
        if self._family is None:
            draws = {n: [model.clean[n], *(model.parameter(n, j) for j in range(k))] for n in names}
            return model.with_shared({n: torch.stack(rows) for n, rows in draws.items()})
        sizes = torch.tensor([model.clean[name].numel() for name in names])
        tensors = torch.tensor([model.tensor_id(name) for name in names], dtype=torch.int32)
        stds = torch.tensor([model.std(name) for name in names])
        theta = torch.cat([model.clean[name] for name in names])
        out = torch.empty(1 + k, len(theta))
        out[0] = theta
        for j in range(k):
            native.perturb_vectors(
                theta, out[1 + j], sizes, tensors, stds, self._family, model.counters(0, j), model.sign(j)
            )
        rows = (part.contiguous() for part in out.split(sizes.tolist(), dim=1))  # C reads them as they lie
        return model.with_shared(dict(zip(names, rows, strict=True)))

    def weights(self, k: int) -> Folded:
        """Folded weights of draw k, those of convolutions ``[O, C, KH, KW]`` in channels_last order."""
        made = {}
        for step, dtype in self._layers:
            weight, bias = self.stacked(step, [k], dtype)
            own = weight[0].permute(0, 3, 1, 2) if weight.ndim == 5 else weight[0]
            made[step.output] = own, None if bias is None else bias[0]
        return made

    def stacked(
        self, step: Layer, ks: Sequence[int | None], dtype: torch.dtype, *, keep: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Folded weights ``[draws, O, KH, KW, C]`` or ``[draws, O, C]`` and biases ``[draws, O]`` of one layer.

        Args:
            step: the layer.
            ks: draws that follow one another; before draw 0 may be None, for no noise.
            dtype: of the weights, bfloat16 or float32; biases are float32.
            keep: remember them until other draws are asked for, because more images follow.
        """
        if self._kept_draws != ks:
            self._kept_draws = list(ks)
            self._kept.clear()
        if step.output in self._kept:
            return self._kept[step.output]
        made = self._stacked(step, ks, dtype)
        if keep:
            self._kept[step.output] = made
        return made

    def _stacked(self, step: Layer, ks: Sequence[int | None], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        first = 0 if ks[0] is None else 1 + ks[0]
        scale, bias = (
            None if row is None else row[first : first + len(ks)] if row.ndim == 2 else row.repeat(len(ks), 1)
            for row in self._rows[step.output]
        )
        name, model = f"{step.module}.weight", self._perturbed
        theta, std = self._clean[name], model.std(name)
        if self._family is None:
            draws = torch.stack([theta if k is None else model.parameter(name, k) for k in ks])
            if scale is not None:
                draws *= scale.reshape(*scale.shape, *[1] * (theta.ndim - 1))
            return draws.movedim(2, -1).to(dtype).contiguous(), bias
        rows, channels, *kernel = theta.shape
        out = torch.empty(len(ks), rows, *kernel, channels, dtype=dtype)
        numbers = [0 if k is None else model.which(k).number for k in ks]
        signs = [0.0 if k is None or std == 0 else model.sign(k) for k in ks]
        stream = model.counters(model.tensor_id(name) if std else 0, 0)
        native.perturb_weights(theta, out, std, scale, self._family, stream, numbers, signs)
        return out, bias
