"""Compile variants of kernels in processes of their own, and hold what comes out to the manifest."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from smi_kernels.aot.variant import Variant
from smi_kernels.errors import InputError
from smi_kernels.registry import load_kernel

SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}
"""Compute capability to the most KiB of shared memory that a block can have. More than that never launches."""

_SPILLS = re.compile(r"(\d+) bytes spill (?:stores|loads)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
# Copies from global to shared memory: Ampere's, and Hopper's by bulk. Not the commits and waits, nor bulk stores.
_ASYNC_COPY = re.compile(r"\bcp\.async\.(?:c[ag]\.shared|bulk\.(?:tensor\.\dd\.)?shared)")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a worker compiles, by name: jitted functions cannot be sent to another process."""

    manifest: str
    index: int
    arch: int
    kernel: str
    variant: str


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a compiled kernel costs: registers and bytes of stack and spills for a thread, shared memory for a block."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    cp_async: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the table: what was compiled, its resources if it did compile, and how that breaks the manifest."""

    task: Task
    resources: Resources | None
    breaches: tuple[str, ...]


@functools.cache
def load_manifest(reference: str) -> tuple[Variant, ...]:
    """The variants that a function gives, by "module:function"."""
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"The manifest {reference!r} cannot be loaded: {error}. Write module:function.") from error
    return tuple(function())


def compile_all(tasks: Sequence[Task], jobs: int) -> Iterator[Measured]:
    """Compile in other processes, so that a compiler that aborts takes down one kernel and not the gate."""
    with tempfile.TemporaryDirectory() as cache, _environment(cache):
        while tasks:
            left = dict.fromkeys(tasks)
            yield from _compile_in_pool(left, jobs)
            # A process died. Kernels start in order, so that it was compiling one of the first that are left.
            suspects, tasks = list(left)[:jobs], list(left)[jobs:]
            for suspect in suspects:
                alone = {suspect: None}
                yield from _compile_in_pool(alone, 1)
                if alone:
                    yield _failed(suspect, "the compiler crashed")


def _compile_in_pool(left: dict[Task, None], jobs: int) -> Iterator[Measured]:
    """Compile what is left, and cross out what is done. Ends early if a process dies."""
    # Spawned, not forked: torch and LLVM have threads.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(measure, task): task for task in left}
        for future in as_completed(futures):
            try:
                result = future.result()
            except BrokenProcessPool:
                continue
            del left[futures[future]]
            yield result


@contextlib.contextmanager
def _environment(cache: str) -> Iterator[None]:
    """What the workers need: a cold cache, because a kernel from the cache has no log of ptxas, and that log."""
    wanted = {"TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def measure(task: Task) -> Measured:
    """Compile one kernel for one architecture and hold it to its manifest."""
    variant = load_manifest(task.manifest)[task.index]
    log = io.StringIO()
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(log):
            compiled = _compile(variant, task.arch)
    except Exception as error:  # whatever a compiler raises is a breach of this kernel, and the others go on
        return _failed(task, f"{type(error).__name__}: {error}")
    seconds = time.perf_counter() - start
    registers, stack = _usage(compiled.asm["cubin"])
    resources = Resources(
        registers=registers,
        shared_bytes=compiled.metadata.shared,
        stack_bytes=stack,
        spill_bytes=_spills(log.getvalue()),
        cp_async=_ASYNC_COPY.search(compiled.asm["ptx"]) is not None,
        seconds=round(seconds, 2),
    )
    return Measured(task=task, resources=resources, breaches=tuple(_breaches(resources, variant, task.arch)))


def _failed(task: Task, reason: str) -> Measured:
    words = " ".join(reason.split())
    short = words if len(words) <= 300 else f"{words[:300]}…"
    return Measured(task=task, resources=None, breaches=(f"does not compile: {short}",))


def _compile(variant: Variant, arch: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = load_kernel(variant.kernel)
    signature = {}
    for name in fn.arg_names:  # in this order: Triton reads the signature by position
        if (name in variant.signature) == (name in variant.constants):
            raise ValueError(f"the argument {name!r} must have either a type or a constant value in the manifest")
        signature[name] = variant.signature.get(name, "constexpr")
    for name in {*variant.signature, *variant.constants, *variant.aligned} - {*fn.arg_names}:
        raise ValueError(f"the manifest names {name!r}, which the kernel does not take")
    attrs = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in sorted(variant.aligned)}
    source = ASTSource(fn=fn, signature=signature, constexprs=dict(variant.constants), attrs=attrs)
    options: dict[str, Any] = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    if variant.fp_fusion is not None:
        options["enable_fp_fusion"] = variant.fp_fusion
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as the cubin says."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = _USAGE.findall(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return max(int(registers) for registers, _ in usage), max(int(stack) for _, stack in usage)


def _spills(log: str) -> int:
    """Bytes that ptxas spilled. No such line means that the log is not there, which must not pass for no spills."""
    found = _SPILLS.findall(log)
    if not found:
        raise RuntimeError("ptxas left no log, so spills are unknown. Triton may have renamed TRITON_DUMP_PTXAS_LOG.")
    return sum(map(int, found))


def _breaches(resources: Resources, variant: Variant, arch: int) -> Iterator[str]:
    expects, available = variant.expects, SHARED_MEMORY[arch] * 1024
    if variant.fp_fusion is None:
        yield "the launcher does not set enable_fp_fusion, whose default depends on the version of Triton"
    if resources.spill_bytes > expects.spill_bytes:
        yield f"spills {resources.spill_bytes} bytes, at most {expects.spill_bytes} expected"
    if resources.stack_bytes > expects.stack_bytes:
        yield f"{resources.stack_bytes} bytes of stack, at most {expects.stack_bytes} expected"
    if resources.registers > expects.max_registers:
        yield f"{resources.registers} registers, at most {expects.max_registers} expected"
    if resources.shared_bytes > available:
        yield f"{resources.shared_bytes} bytes of shared memory, and sm_{arch} has {available}"
    if expects.cp_async is not None and arch >= 80 and resources.cp_async is not expects.cp_async:
        yield "cp.async is missing" if expects.cp_async else "cp.async is there and was not expected"
