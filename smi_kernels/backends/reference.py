"""The reference: ``torch.func.functional_call`` on the model as it is, any module on any device, draw by draw."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from smi_kernels.backends.loop import score_draws
from smi_kernels.noise.perturbed_model import PerturbedModel
from smi_kernels.precision import plain
from smi_kernels.request import Request, check_logits


def supports(model: nn.Module, request: Request) -> bool:
    """The reference supports whatever passed the checks."""
    return True


def scores(model: nn.Module, request: Request) -> Tensor:
    """Scores ``[N]``, or ``[N, K]`` if the request wants no reduction; see `smi_kernels.stability_scores`."""
    return score_draws(_Scorer(model, request), request)


class _Scorer:
    def __init__(self, model: nn.Module, request: Request) -> None:
        self._model, self._request = model, request
        self._perturbed = PerturbedModel(model, request)

    @property
    def has_noise(self) -> bool:
        return self._perturbed.has_noise

    def weights(self, k: int | None) -> dict[str, Tensor]:
        return self._perturbed.clean if k is None else self._perturbed.state(k)

    def logits(self, images: Tensor, weights: dict[str, Tensor], *, perturbed: bool) -> Tensor:
        low = self._request.dtype in (torch.bfloat16, torch.float16)
        # Also for float32, to leave an autocast region of the caller.
        ends = _Float32Ends(images.shape[1]) if low else nullcontext()
        device = images.device
        with torch.autocast(device.type, self._request.dtype) if low else plain(device), ends:
            logits = functional_call(self._model, weights, (images,))
        check_logits(logits, self._request, len(images), perturbed=perturbed)
        return logits.to(self._request.working_dtype)


class _Float32Ends(TorchFunctionMode):
    """Runs a model's two ends outside autocast, see `smi_kernels.graph.plan.Layer`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._channels = channels

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._is_end(func, args):
            return func(*args, **kwargs)
        with plain(args[0].device):
            return func(args[0].float(), *args[1:], **kwargs)

    def _is_end(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
        if not args:
            return False
        if func is F.linear:
            return args[0].ndim == 2
        return func is F.conv2d and args[0].shape[1] == self._channels
