"""One kernel in one configuration, and what it may cost once it is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from smi_kernels.registry import Kernel, load_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
"""Types as they are called in a variant's name."""

_HALF = (80, 86, 89, 90)  # from sm_80 on, see `backends.triton.supports`: below, Triton's products in 16 bits spill
ARCHS: dict[torch.dtype, tuple[int, ...] | None] = {BF16: _HALF, FP16: _HALF, FP32: None}
"""Compute capabilities on which a type is used; None for all."""


@dataclass(frozen=True, kw_only=True)
class Expects:
    """What a compiled kernel may cost. Breaking one of these breaks the build.

    Attributes:
        spill_bytes: most bytes that ptxas may spill, stores and loads together.
        stack_bytes: most bytes of stack, for a thread.
        max_registers: most registers, for a thread. 255 is what the hardware has.
        cp_async: True: global memory must be read asynchronously, or pipelining has silently stopped. False: it must
            not be. None: not checked, nor is it below sm_80, which lacks it.
    """

    spill_bytes: int = 0
    stack_bytes: int = 0
    max_registers: int = 255
    cp_async: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel in one configuration.

    Attributes:
        kernel: a ``@triton.jit`` function or "module:name" of one.
        name: which configuration; with the kernel's name it is unique.
        signature: type of each argument that is not a constant, as Triton writes it: ``*fp32``, ``i32``, ``fp32``.
        constants: values of the others: tile sizes, jitted functions, None for an absent pointer, 1 for a size that is
            1 (Triton then makes it a constant by itself).
        aligned: arguments that are multiples of 16: pointers, strides, sizes. Without them no load is wide and nothing
            is asynchronous.
        fp_fusion: whether a multiplication and an addition may become one operation, rounded once. None: the launcher
            leaves it to Triton, whose default depends on its version; the gate does not let that pass.
        archs: compute capabilities for which it is compiled; None for all.
    """

    kernel: Kernel
    name: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    aligned: frozenset[str] = frozenset()
    num_warps: int
    num_stages: int
    fp_fusion: bool | None
    archs: tuple[int, ...] | None = None
    expects: Expects = Expects()

    @property
    def kernel_name(self) -> str:
        """The operator's folder, or a file of another name, and the function: ``score_logits._score_logits``."""
        fn = load_kernel(self.kernel)
        return f"{fn.__module__.removesuffix('.kernel').rpartition('.')[2]}.{fn.__name__}"


def sizes(*numbers: int) -> str:
    """Sizes in a variant's name."""
    return "x".join(map(str, numbers))


def pairs(antithetic: bool) -> str:
    """Whether draws are antithetic, in a variant's name."""
    return " antithetic" if antithetic else ""
