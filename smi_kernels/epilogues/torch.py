"""Epilogues: the activation that follows a layer, which a kernel applies before it stores the layer's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi_kernels.registry import Kernel, Registry


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """An elementwise activation.

    Attributes:
        compute: tensor to tensor of the same shape and dtype; differentiable.
        kernel: the twin of ``compute`` in Triton, a ``@triton.jit`` function or "module:name" of one, from a float32
            block to a float32 block. None: the Triton backend runs the activation by itself, after the layer.
        matches: module types and functions that mean this activation when they are called with the layer's output
            alone (``inplace`` aside), whatever a module's settings, such as ``(nn.ReLU, F.relu, torch.relu,
            "relu")``; a string is a tensor method.
    """

    compute: Callable[[Tensor], Tensor]
    kernel: Kernel = None
    matches: tuple[object, ...] = ()


epilogues: Registry[Epilogue] = Registry("epilogue")
"""Epilogues by name."""


def _identity(x: Tensor) -> Tensor:
    return x


_KERNELS = "smi_kernels.epilogues.triton"
epilogues.add("identity", Epilogue(compute=_identity, kernel=f"{_KERNELS}:identity"))
epilogues.add(
    "relu", Epilogue(compute=F.relu, kernel=f"{_KERNELS}:relu", matches=(nn.ReLU, F.relu, torch.relu, "relu", "relu_"))
)
epilogues.add("relu6", Epilogue(compute=F.relu6, kernel=f"{_KERNELS}:relu6", matches=(nn.ReLU6, F.relu6)))
epilogues.add("silu", Epilogue(compute=F.silu, kernel=f"{_KERNELS}:silu", matches=(nn.SiLU, F.silu)))
epilogues.add("gelu", Epilogue(compute=F.gelu, kernel=f"{_KERNELS}:gelu", matches=(F.gelu,)))
