"""Scores in torch, on any device: BatchNorm folded, activations fused where oneDNN can, channels_last, bfloat16.

Draws are the outer loop, so that one set of perturbed weights exists at a time, whatever K is.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from smi_kernels.backends import fused, reference, shared, together
from smi_kernels.backends.loop import score_draws
from smi_kernels.backends.prepared import Folded, Prepared, prepares
from smi_kernels.epilogues import epilogues
from smi_kernels.graph.folding import fold
from smi_kernels.graph.layers import layers, zero_padding
from smi_kernels.graph.plan import Call, Layer, Plan, arguments, plan_of
from smi_kernels.graph.tracing import NotTraceable
from smi_kernels.noise.perturbed_model import PerturbedModel
from smi_kernels.precision import plain
from smi_kernels.request import Request, check_logits


def supports(model: nn.Module, request: Request) -> bool:
    """Whatever passed the checks: what cannot be planned is left to the reference."""
    return True


def scores(model: nn.Module, request: Request) -> Tensor:
    """Scores ``[N]``, or ``[N, K]`` if the request wants no reduction; see `smi_kernels.stability_scores`."""
    plan = plan_or_warn(model, request)
    if plan is None:
        return reference.scores(model, request)
    runner = Runner(model, plan, request)
    if together.runs(runner, request):
        if fused.fuses(request):
            return score_draws(runner, request, lambda: together.divergences(runner, request, fused.run_layer))
        if shared.shares(plan, runner.modules, request):
            return score_draws(runner, request, lambda: together.divergences(runner, request, shared.run_layer))
    return score_draws(runner, request)


def plan_or_warn(model: nn.Module, request: Request) -> Plan | None:
    """The plan of a model, or None; warns if a part of it is slow."""
    try:
        plan = plan_of(model, request.images)
    except NotTraceable as reason:
        _warn_once(f"{type(model).__name__} is scored by the slow path, correctly: {reason}.")
        return None
    for name in plan.unknown:
        kind = type(model.get_submodule(name)).__name__
        _warn_once(
            f"Layer {name!r} has the type {kind}, which smi_kernels does not know: it is run by the slow path, "
            "correctly. To teach it the type, see smi_kernels.register_layer."
        )
    return plan


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


class Runner:
    """A planned model with the weights of any draw; a `Scorer`."""

    def __init__(self, model: nn.Module, plan: Plan, request: Request) -> None:
        self.plan, self.request = plan, request
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.perturbed = PerturbedModel(model, request)

    @property
    def has_noise(self) -> bool:
        """Whether any parameter gets noise."""
        return self.perturbed.has_noise

    def weights(self, k: int | None) -> tuple[dict[str, Tensor], Folded]:
        """State by name, and folded weights by layer, of draw k; of the unperturbed model for None."""
        if k is not None and prepares(self.request):
            state = self.perturbed.state(k) if self.plan.reads_parameters else self.perturbed.clean
            return self.perturbed.with_shared(state), self.prepared.weights(k)
        state = self.perturbed.with_shared(self.perturbed.clean if k is None else self.perturbed.state(k))
        folded = {step.output: self._folded(step, state) for step, _ in self.plan.steps if isinstance(step, Layer)}
        return state, folded

    @functools.cached_property
    def largest_weight(self) -> int:
        """Elements of the largest weight of a layer."""
        names = (f"{step.module}.weight" for step, _ in self.plan.steps if isinstance(step, Layer))
        state = self.perturbed.with_shared(self.perturbed.clean)
        return max((state[name].numel() for name in names), default=1)

    @functools.cached_property
    def prepared(self) -> Prepared:
        """Weights made in C, if `prepares` holds."""
        return Prepared(self.modules, self.plan, self.perturbed, self.request, self.layer_dtype)

    def layer_dtype(self, layer: Layer) -> torch.dtype:
        """The format in which a layer multiplies."""
        return self.request.working_dtype if layer.is_end else self.request.dtype

    def _folded(self, layer: Layer, state: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        weight = state[f"{layer.module}.weight"]
        scale, bias = fold(layer, self.modules[layer.norm] if layer.norm is not None else None, state)
        if scale is not None:
            weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        memory = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
        return weight.to(self.layer_dtype(layer), memory_format=memory), bias

    def logits(self, images: Tensor, weights: tuple[dict[str, Tensor], Folded], *, perturbed: bool) -> Tensor:
        """Logits ``[n, C]`` in the working dtype."""
        state, folded = weights

        def layer(step: Layer, x: Tensor, residual: Tensor | None) -> Tensor:
            return self.run_layer(step, x, residual, *folded[step.output])

        def call(step: Call, values: Mapping[str, Any]) -> Any:
            return self.run_call(step, values, state)

        images = images.contiguous(memory_format=torch.channels_last)
        with plain(images.device):
            logits = self.plan.run(images, layer, call)
        check_logits(logits, self.request, len(images), perturbed=perturbed)
        return logits.to(self.request.working_dtype)

    def run_layer(self, step: Layer, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """act(W x + b + residual), in the format of the layer."""
        if isinstance(self.modules[step.module], nn.Linear):
            y = F.linear(x.to(weight.dtype), weight, bias)
            return epilogues[step.epilogue].compute(y if residual is None else y + residual)
        return self.convolve(step, x, residual, weight, bias)

    def convolve(self, step: Layer, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """act(W x + b + residual) for a convolution."""
        module, activation = self.modules[step.module], epilogues[step.epilogue].compute
        padding = zero_padding(module)
        shape = (padding, module.stride, module.dilation, module.groups)
        x = x.to(weight.dtype)
        if x.requires_grad or not _has_onednn(x.device.type, x.dtype):
            y = _conv(x, weight, bias, shape)
            return activation(y if residual is None else y + residual).to(weight.dtype)
        if residual is None and step.epilogue in _ONEDNN:
            return _onednn_conv(x, weight, bias, shape, _ONEDNN[step.epilogue])
        y = _onednn_conv(x, weight, bias, shape, "none")
        if residual is not None:
            y = y.add_(residual)  # ours alone; oneDNN's own addition rounds the bias to bfloat16
        return y.relu_() if step.epilogue == "relu" else activation(y)

    def run_call(self, step: Call, values: Mapping[str, Any], state: dict[str, Tensor]) -> Any:
        """A call as the model makes it; what has parameters is run in the working dtype."""
        args, kwargs = arguments(step, values, state)
        if step.reads_parameters and not self._keeps_format(step):
            args, kwargs = self._widened(args), self._widened(kwargs)
        if step.op == "call_method":
            return getattr(args[0], step.target)(*args[1:], **kwargs)
        if step.op == "call_function":
            return step.target(*args, **kwargs)
        module = self.modules[step.target]
        if not step.reads_parameters:
            return module(*args, **kwargs)
        prefix = f"{step.target}."
        own = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        if type(module) in layers:
            return layers[type(module)](module, own, *args, **kwargs)
        return functional_call(module, own, args, kwargs)

    def meaning(self, step: Call) -> Any:
        """What a call does: the type of its module, or its function or method name."""
        return type(self.modules[step.target]) if step.op == "call_module" else step.target

    def _keeps_format(self, step: Call) -> bool:
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return self.meaning(step) in norms

    def _widened(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.request.working_dtype)
        if isinstance(value, tuple | list):
            return type(value)(map(self._widened, value))
        if isinstance(value, dict):
            return {key: self._widened(item) for key, item in value.items()}
        return value


_ONEDNN = {"identity": "none", "relu": "relu"}
"""Epilogues that oneDNN applies within a convolution, by its names."""


def _onednn_conv(x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[Any, ...], activation: str) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, activation, [], "")


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[Any, ...]) -> Tensor:
    """W x + b, in float32 if W is narrower: a bias rounded to bfloat16 shifts a whole channel, and differs by draw."""
    padding, stride, *rest = shape
    if bias is None or bias.dtype == weight.dtype:
        return F.conv2d(x, weight, bias, stride, padding, *rest)
    return F.conv2d(x, weight, None, stride, padding, *rest) + bias[:, None, None]


@functools.cache
def _has_onednn(device: str, dtype: torch.dtype) -> bool:
    """Whether torch's operator for a convolution with an epilogue is there and right; its name is not public."""
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 3, 5, 5), (4, 3, 3, 3)))
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    bias = torch.randn(4, generator=generator)
    expected = F.relu(F.conv2d(x.float(), weight.float(), bias, padding=1))
    try:
        found = _onednn_conv(x, weight, bias, ((1, 1), (1, 1), (1, 1), 1), "relu")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return found.dtype == dtype and torch.allclose(found.float(), expected, rtol=0.01, atol=0.01)
