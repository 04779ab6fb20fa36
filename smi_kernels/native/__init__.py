"""Noise in C, built when it is first used: the same bits as in torch, several times faster.

torch needs about a hundred passes over memory for one Philox; a C compiler does them in registers. Where there is no
compiler, or the library does not give torch's bits, noise is drawn in torch. ``SMI_KERNELS_NATIVE=0`` asks for that.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("noise.c")
FLAGS = ("-O3", "-march=native", "-std=c11", "-shared", "-fPIC")
EXACT = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
"""No operation may be fused with another, or the bits change; errors of sqrt need not be recorded."""

_SHARE = 1 << 17  # elements from which on another thread pays


class Stream(ctypes.Structure):
    """Words 1 to 3 of the counters, and the key."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("tensor", "draw", "stream", "key_low", "key_high")]


class Weight(ctypes.Structure):
    """A weight ``[rows, channels, taps]``, how it is scaled and by how much it is perturbed."""

    _fields_ = [
        ("theta", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("channels", ctypes.c_int64), ("taps", ctypes.c_int64),
        ("std", ctypes.c_float),
    ]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, built and loaded; None where that is impossible or was not wanted."""
    if os.environ.get("SMI_KERNELS_NATIVE") == "0":
        return None
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.name != "posix":
        return None
    try:
        loaded = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError):
        return None
    for name in ("gaussian", "rademacher"):
        function = getattr(loaded, name)
        function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, Stream, ctypes.c_float)
        function.restype = None
    loaded.perturb_weight.argtypes = (
        ctypes.c_void_p, ctypes.c_int, ctypes.c_int, Weight, ctypes.c_int64, ctypes.c_int64, Stream, ctypes.c_float
    )  # fmt: skip
    loaded.perturb_weight.restype = ctypes.c_int
    loaded.perturb_vectors.argtypes = (
        *[ctypes.c_void_p] * 5, ctypes.c_int64, ctypes.c_int, Stream, ctypes.c_float
    )  # fmt: skip
    loaded.perturb_vectors.restype = None
    return loaded


def _built(compiler: str) -> Path:
    """Path of the compiled library, from the cache if this source was built before for such a processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    parts = (SOURCE.read_bytes(), repr((compiler, FLAGS, EXACT)).encode(), version, _processor())
    target = _cache() / f"noise-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:24]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh = Path(folder) / "noise.so"
            command = [compiler, *FLAGS, *EXACT, str(SOURCE), "-o", str(fresh), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
            fresh.replace(target)  # atomic, so that processes that build at once do not harm each other
    return target


def _cache() -> Path:
    """A folder that only this user can write to, because what lies there is executed."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(base) / "smi_kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written to by others.")
    return folder


def _processor() -> bytes:
    """What ``-march=native`` depends on: home folders are shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "").encode()


@functools.cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="smi-noise")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # a forked child has the pool's lock but not its threads


def fill(out: Tensor, function: str, per_counter: int, first: int, stream: Stream, sign: float) -> None:
    """Fill contiguous float32 ``out`` with unit noise; ``library()`` must not be None.

    Args:
        out: ``[size]`` on the CPU.
        function: name of a family's function in the C source.
        per_counter: noise values that one counter gives.
        first: counter of the first element.
        stream: the other words of the counters, and the key.
        sign: +1 or −1, a factor.
    """
    run, size, address = getattr(library(), function), out.numel(), out.data_ptr()
    _split(
        size,
        size,
        128,  # whole counters, whatever the family
        lambda s, end: run(address + 4 * s, end - s, first + s // per_counter, stream, sign),
    )


def perturb_weight(
    theta: Tensor, out: Tensor, std: float, scale: Tensor | None, function: str, stream: Stream, sign: float
) -> None:
    """(θ + σ noise) · scale in the memory order of channels_last; ``library()`` must not be None.

    Args:
        theta: float32 ``[rows, channels, *kernel]`` or ``[rows, channels]``, contiguous, on the CPU.
        out: as many elements, bfloat16 or float32; for a convolution in channels_last order. Overwritten.
        std: σ ≥ 0.
        scale: float32 ``[rows]``, contiguous, or None.
        function: name of a family's function in the C source.
        stream: the words of the counters other than the first, and the key.
        sign: +1 or −1, a factor of the noise.
    """
    rows, channels = theta.shape[:2]
    weight = Weight(
        theta.data_ptr(), scale.data_ptr() if scale is not None else None, channels, theta[0, 0].numel(), std
    )
    low, signs = int(out.dtype == torch.bfloat16), int(function == "rademacher")
    run, address = library().perturb_weight, out.data_ptr()  # type: ignore[union-attr]

    def part(first: int, last: int) -> None:
        if not run(address, low, signs, weight, first, last, stream, sign):
            raise MemoryError("No memory for the noise of a layer.")

    _split(rows, theta.numel(), 1, part)


def perturb_vectors(
    theta: Tensor, out: Tensor, sizes: Tensor, tensors: Tensor, stds: Tensor, function: str, stream: Stream, sign: float
) -> None:
    """θ + σ noise for several small tensors that lie one after the other; ``library()`` must not be None.

    Args:
        theta: float32 ``[total]``.
        out: likewise; overwritten.
        sizes, tensors, stds: elements (int64), id (int32, its bits) and σ (float32) of each tensor, ``[T]``.
        function, stream, sign: as for `perturb_weight`; the stream's tensor id is not used.
    """
    addresses = (t.data_ptr() for t in (out, theta, sizes, tensors, stds))
    library().perturb_vectors(*addresses, len(sizes), int(function == "rademacher"), stream, sign)  # type: ignore[union-attr]


def _split(size: int, elements: int, unit: int, run: Callable[[int, int], object]) -> None:
    """Call ``run(start, end)`` for parts of range(size), in multiples of ``unit``, by as many threads as pay."""
    threads = min(torch.get_num_threads(), elements // _SHARE + 1)
    if threads == 1:
        run(0, size)
        return
    step = -(-size // threads // unit) * unit
    jobs = [_workers().submit(run, start, min(start + step, size)) for start in range(0, size, step)]
    for job in jobs:
        job.result()
