"""Ways to compute scores. All draw the same noise; they differ in speed and in what they can run.

``backend="auto"`` takes the one of highest priority that supports the model and the request. The environment variable
``SMI_KERNELS_BACKEND`` replaces ``"auto"``, never a name given in code.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from smi_kernels.backends import reference, torch as torch_backend, triton as triton_backend
from smi_kernels.errors import InputError, unknown_name
from smi_kernels.registry import Registry
from smi_kernels.request import Request

ENVIRONMENT = "SMI_KERNELS_BACKEND"
"""Name of the environment variable that replaces ``"auto"``."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A way to compute scores.

    Attributes:
        scores: model and request to scores in the working dtype, ``[N]``, or ``[N, K]`` without a reduction.
        supports: whether it can do so, cheaply decided.
        priority: the highest that supports a request is chosen; torch has 0.
    """

    scores: Callable[[nn.Module, Request], Tensor]
    supports: Callable[[nn.Module, Request], bool]
    priority: int


backends: Registry[Backend] = Registry("backend")
"""Backends by name."""

backends.add("reference", Backend(scores=reference.scores, supports=reference.supports, priority=-10))
backends.add("torch", Backend(scores=torch_backend.scores, supports=torch_backend.supports, priority=0))
backends.add("triton", Backend(scores=triton_backend.scores, supports=triton_backend.supports, priority=10))


def choose_backend(name: str, model: nn.Module, request: Request) -> str:
    """Name of the backend asked for, or for ``"auto"`` of the best that supports the request.

    Raises:
        InputError: for an unknown name, or a backend that does not support the request.
    """
    if name == "auto":
        name = os.environ.get(ENVIRONMENT) or "auto"
    if name == "auto":
        ranked = sorted(backends, key=lambda other: -backends[other].priority)
        return next(other for other in ranked if backends[other].supports(model, request))
    if name not in backends:
        raise unknown_name("backend", name, [*backends, "auto"])
    if not backends[name].supports(model, request):
        raise InputError(f"The backend {name!r} cannot score this model with these settings. Try backend='auto'.")
    return name
