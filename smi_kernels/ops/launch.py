"""What operators share: which draws they make, checks of what they are given, and how a kernel is launched.

Kernels run compiled on CUDA tensors, or on CPU tensors in Triton's interpreter: set ``TRITON_INTERPRET=1`` before
anything imports triton. The interpreter is for tests; it is thousands of times slower. This module does not import
triton.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from smi_kernels.errors import InputError
from smi_kernels.noise import Draw, Family
from smi_kernels.registry import load_kernel

Function = TypeVar("Function", bound=Callable[..., Any])

LOW_PRECISION = (torch.bfloat16, torch.float16)
"""Output types of a kernel, beside float32."""


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def compiled(tensor: Tensor) -> bool:
    """Whether kernels run on a tensor's device."""
    return tensor.is_cuda or interpreting()


def launched(reference: Function, tensor: Tensor) -> Function:
    """The launcher that stands for a function of ``reference.py``, where kernels run on the tensor; else that function.

    The launcher has the same name and arguments, and is in ``kernel.py`` beside it.
    """
    if not compiled(tensor):
        return reference
    module = importlib.import_module(reference.__module__.removesuffix("reference") + "kernel")
    return getattr(module, reference.__name__)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Draws of noise that follow one another. Results do not depend on how they are split between calls.

    Attributes:
        first: index of the first draw, from 0.
        count: number of draws, 1 to 65535.
        seed: in [0, 2⁶⁴).
        antithetic: draws 2j and 2j + 1 are +E and −E.

    Raises:
        InputError: for numbers out of range.
    """

    first: int
    count: int
    seed: int
    antithetic: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 65535 or not 0 <= self.first < (1 << 31) - self.count:
            raise InputError(
                f"first={self.first} and draws={self.count} cannot be used. Allowed: 1 to 65535 draws in [0, 2³¹)."
            )
        key_words(self.seed)

    @classmethod
    def of(cls, first: int, count: int, seed_low: int, seed_high: int, antithetic: bool) -> Draws:
        """As an operator is given them: the seed as two 32-bit words, because operators take signed integers."""
        return cls(first=first, count=count, seed=seed_low | seed_high << 32, antithetic=antithetic)

    def each(self, stream: int) -> list[Draw]:
        """One after the other."""
        numbers = range(self.first, self.first + self.count)
        return [Draw(seed=self.seed, k=k, stream=stream, antithetic=self.antithetic) for k in numbers]

    def grid(self) -> tuple[int, int, int]:
        """How a grid dimension of programs covers the draws: an antithetic pair is drawn once and stored twice.

        Program i draws number n = first_number + i of the counter, and stores it as draws n·signs + s, s in [0, signs),
        negated for s = 1, as far as they lie in [first, first + count).

        Returns:
            (programs, first_number, signs).
        """
        signs = 2 if self.antithetic else 1
        first_number = self.first // signs
        return (self.first + self.count - 1) // signs - first_number + 1, first_number, signs


@dataclass(frozen=True, kw_only=True)
class Signs:
    """Rademacher noise that a product adds to one weight shared by its draws, instead of reading a weight a draw.

    Weights are added in float32 and rounded once to the weight's dtype, in the interpreter too.

    Attributes:
        std: of the noise.
        tensor: id of the weight in [0, 2³²).
        which: the draws.
        scale: float32 ``[draws, outputs]``, which multiplies the float32 sums before the bias is added (a folded
            BatchNorm; it is not part of the weights), or None.
    """

    std: float
    tensor: int
    which: Draws
    scale: Tensor | None = None


def family_kernel(family: Family) -> object:
    """The Triton twin of a family.

    Raises:
        InputError: for a family without one.
    """
    if family.kernel is None:
        raise InputError("The noise family has no Triton kernel. Pass Family(kernel=...), or use the torch backend.")
    return load_kernel(family.kernel)


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


def check_layer(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, residual: Tensor | None, y: Tensor, draws: int
) -> None:
    """Raise `InputError` unless a layer's tensors fit x and the result y: ``[draws·M, F]``, or images channels_last."""
    for name, tensor in (("x", x), ("out_dtype", y)):
        check_dtype(name, tensor, torch.float32, *LOW_PRECISION)
    check_dtype("weight", weight, x.dtype)
    for name, rows in (("scale", scale), ("bias", bias)):
        check_dtype(name, rows, torch.float32)
        check_shape(name, rows, (draws, y.shape[1]))
    check_dtype("residual", residual, y.dtype)
    check_shape("residual", residual, tuple(y.shape))
    flat = {"weight": weight, "scale": scale, "bias": bias}
    for name, images in (("x", x), ("residual", residual)):
        flat[name] = images.permute(0, 2, 3, 1) if images is not None and images.ndim == 4 else images
        if images is not None and images.ndim == 4 and not images.is_contiguous(memory_format=torch.channels_last):
            raise InputError(
                f"{name} is not contiguous in channels_last order. Allowed: memory_format=torch.channels_last. Call "
                ".contiguous(memory_format=torch.channels_last) on it."
            )
    check_tensors(**flat)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def readable(tensor: Tensor | None) -> Tensor | None:
    """The tensor as a kernel can read it: in the interpreter, which misreads bfloat16, a float32 copy of 16 bits."""
    return tensor.float() if tensor is not None and interpreting() and tensor.dtype in LOW_PRECISION else tensor


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


def tensor_word(tensor: int) -> int:
    """A tensor's id as a kernel argument; `InputError` for one outside [0, 2³²)."""
    if not 0 <= tensor < 1 << 32:
        raise InputError(f"tensor is {tensor}. Allowed: an id in [0, 2³²).")
    return as_word(tensor)


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
