"""Noise and perturbed parameters in C; see `noise.c`. For all of these `library` must not be None."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from smi_kernels.native.build import library

_SHARE = 1 << 17  # elements from which on another thread pays


class Stream(ctypes.Structure):
    """Words 1 to 3 of the counters, and the key."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("tensor", "draw", "stream", "key_low", "key_high")]


class _Weight(ctypes.Structure):
    """A weight ``[rows, channels, taps]`` and how much it is perturbed."""

    _fields_ = [
        ("theta", ctypes.c_void_p), ("rows", ctypes.c_int64), ("channels", ctypes.c_int64), ("taps", ctypes.c_int64),
        ("std", ctypes.c_float),
    ]  # fmt: skip


@functools.cache
def _function(name: str) -> ctypes._NamedFuncPointer:
    function = getattr(library(), name)
    pointer, size, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    function.argtypes, function.restype = {
        "gaussian": ((pointer, size, ctypes.c_uint32, Stream, real), None),
        "rademacher": ((pointer, size, ctypes.c_uint32, Stream, real), None),
        "perturb_weights": ((*[pointer] * 4, integer, integer, integer, integer, _Weight, Stream), integer),
        "perturb_vectors": ((*[pointer] * 5, size, integer, Stream, real), None),
    }[name]
    return function


@functools.cache
def _workers() -> ThreadPoolExecutor:
    # Not OpenMP's threads: those do not survive a fork, and noise is drawn in forked processes too.
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="smi-noise")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # a forked child has the pool's lock but not its threads


def fill(out: Tensor, function: str, per_counter: int, first: int, stream: Stream, sign: float) -> None:
    """Fill contiguous float32 ``out`` with unit noise.

    Args:
        out: ``[size]`` on the CPU.
        function: name of a family's function in the C source.
        per_counter: noise values that one counter gives.
        first: counter of the first element.
        stream: the other words of the counters, and the key.
        sign: +1 or −1, a factor.
    """
    run, size, address = _function(function), out.numel(), out.data_ptr()

    def part(start: int, end: int) -> None:
        run(address + 4 * start, end - start, first + start // per_counter, stream, sign)

    threads = min(torch.get_num_threads(), size // _SHARE + 1)
    if threads == 1:
        part(0, size)
        return
    step = -(-size // threads // 128) * 128  # whole counters, whatever the family
    jobs = [_workers().submit(part, start, min(start + step, size)) for start in range(0, size, step)]
    for job in jobs:
        job.result()


def perturb_weights(
    theta: Tensor,
    out: Tensor,
    std: float,
    scale: Tensor | None,
    function: str,
    stream: Stream,
    draws: Sequence[int],
    signs: Sequence[float],
) -> None:
    """(θ + sign · σ noise) · scale for several draws, in the memory order of channels_last.

    Args:
        theta: float32 ``[rows, channels, *kernel]`` or ``[rows, channels]``, contiguous, on the CPU.
        out: bfloat16 or float32 ``[draws, rows, *kernel, channels]``, contiguous. Overwritten.
        std: σ ≥ 0.
        scale: float32 ``[draws, rows]``, contiguous, or None.
        function: name of a family's function in the C source.
        stream: the words of the counters other than the first and the draw, and the key.
        draws: the words for the draws.
        signs: +1 or −1, or 0 for a draw without noise.

    Raises:
        MemoryError: if there is none left.
    """
    rows, channels = theta.shape[:2]
    weight = _Weight(theta.data_ptr(), rows, channels, theta[0, 0].numel(), std)
    count = len(draws)
    done = _function("perturb_weights")(
        out.data_ptr(), scale.data_ptr() if scale is not None else None, (ctypes.c_uint32 * count)(*draws),
        (ctypes.c_float * count)(*signs), count, int(out.dtype == torch.bfloat16), int(function == "rademacher"),
        min(torch.get_num_threads(), count * theta.numel() // _SHARE * 4 + 1), weight, stream,
    )  # fmt: skip
    if not done:
        raise MemoryError("No memory for the noise of a layer.")


def perturb_vectors(
    theta: Tensor, out: Tensor, sizes: Tensor, tensors: Tensor, stds: Tensor, function: str, stream: Stream, sign: float
) -> None:
    """θ + σ noise for several small tensors that lie one after the other.

    Args:
        theta: float32 ``[total]``.
        out: likewise; overwritten.
        sizes: elements of each tensor, int64 ``[T]``.
        tensors: id of each, int32 ``[T]``, its bits.
        stds: σ of each, float32 ``[T]``.
        function: as for `fill`.
        stream: as for `fill`; its tensor id is not used.
        sign: as for `fill`.
    """
    addresses = (t.data_ptr() for t in (out, theta, sizes, tensors, stds))
    _function("perturb_vectors")(*addresses, len(sizes), int(function == "rademacher"), stream, sign)
