"""Which number format the model runs in. Logits, softmax and divergence are float32 or float64 whatever it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from smi_kernels.errors import unknown_name

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""Formats by name; besides, ``"auto"``."""


def resolve_dtype(dtype: str | torch.dtype, model: nn.Module, images: Tensor) -> torch.dtype:
    """The format that ``dtype`` asks for.

    ``"auto"`` is float64 for a float64 model, else bfloat16 where the hardware computes in it, else float32.

    Raises:
        InputError: for a format that is not in `DTYPES`.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        dtypes = {p.dtype for p in model.parameters()} or {images.dtype}
        if torch.float64 in dtypes:
            return torch.float64
        return torch.bfloat16 if has_bfloat16(images.device) else torch.float32
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, [*DTYPES, "auto"])
    return DTYPES[dtype]


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64 (mps does not)."""
    return device.type in ("cpu", "cuda", "meta")


def plain(device: torch.device) -> AbstractContextManager[Any]:
    """A block without autocast, where the device has one."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices natively, rather than by emulation, which is slower than float32.

    On a CPU that takes AVX512-BF16 or AMX instructions, and oneDNN, that they are not switched off for torch. It
    answers through functions whose names are private and change between versions; one that is missing counts as a no,
    so that float32 is used.
    """
    if device.type == "cpu":
        checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        native = any(check() for check in checks if check is not None)
        return native and torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return False
