"""Triton kernels and their launchers; what the launchers share. Importing this package does not import triton.

Kernels run compiled on CUDA tensors, or on CPU tensors in Triton's interpreter: set ``TRITON_INTERPRET=1`` before
anything imports triton. The interpreter is for tests; it is thousands of times slower.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from smi_kernels.errors import InputError

LOW_PRECISION = (torch.bfloat16, torch.float16)
"""Output types of a kernel, beside float32."""


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_tensors(**tensors: Tensor | None) -> None:
    """Check that tensors (None is left out), named for the message, can be passed to a kernel by pointer.

    Raises:
        InputError: for a tensor that is not contiguous, or tensors that are not all on one CUDA device (all on the
            CPU in the interpreter). A kernel reads garbage from the former and crashes on the latter.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    wanted = "cpu" if interpreting() else "cuda"
    devices = {tensor.device for tensor in given.values()}
    for name, tensor in given.items():
        if not tensor.is_contiguous():
            raise InputError(f"{name} is not contiguous. Allowed: contiguous tensors. Call .contiguous() on it.")
        if tensor.device.type != wanted:
            raise InputError(
                f"{name} is on {tensor.device}. Allowed: {wanted}. Triton kernels need a CUDA device, or the CPU with "
                "the environment variable TRITON_INTERPRET=1, set before triton is imported."
            )
    if len(devices) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise InputError(f"Tensors are on several devices: {places}. Allowed: one device.")


def check_dtype(name: str, tensor: Tensor | None, *allowed: torch.dtype) -> None:
    """Raise `InputError` unless the tensor, named for the message, is None or has an allowed dtype."""
    if tensor is not None and tensor.dtype not in allowed:
        names = ", ".join(_dtype_name(dtype) for dtype in allowed)
        raise InputError(f"{name} is {_dtype_name(tensor.dtype)}. Allowed: {names}.")


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise `InputError` unless the tensor, named for the message, is None or has this shape."""
    if tensor is not None and tuple(tensor.shape) != shape:
        raise InputError(f"{name} has shape {list(tensor.shape)}. Allowed here: {list(shape)}.")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def readable(tensor: Tensor) -> Tensor:
    """The tensor as a kernel can read it: in the interpreter, which misreads bfloat16, a float32 copy of 16 bits."""
    return tensor.float() if interpreting() and tensor.dtype in LOW_PRECISION else tensor


@contextmanager
def writable(out: Tensor) -> Iterator[Tensor]:
    """What a kernel writes instead of ``out``: in the interpreter a float32 tensor, cast into ``out`` at the end."""
    if not (interpreting() and out.dtype in LOW_PRECISION):
        yield out
        return
    full = out.float()  # a copy, so that what the kernel leaves out keeps its value
    yield full
    out.copy_(full)


@contextmanager
def on_device(tensor: Tensor) -> Iterator[None]:
    """Launch on the tensor's device, which need not be the current one."""
    with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
        yield


def as_word(value: int) -> int:
    """A word in [0, 2³²) as the int32 with the same bits, so that a kernel argument has one type for all values."""
    return value - (1 << 32) if value >= 1 << 31 else value


def key_words(seed: int) -> tuple[int, int]:
    """Low and high word of a seed in [0, 2⁶⁴), as kernel arguments.

    Raises:
        InputError: for another seed.
    """
    if not 0 <= seed < 1 << 64:
        raise InputError(f"seed is {seed}. Allowed: an integer in [0, 2⁶⁴).")
    return as_word(seed & 0xFFFFFFFF), as_word(seed >> 32)


def next_power_of_two(value: int) -> int:
    """The least power of two that is at least ``value`` ≥ 1."""
    return 1 << (value - 1).bit_length()
