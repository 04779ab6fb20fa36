"""The ahead-of-time gate: compiles every shipped kernel for GPUs that are not there, and holds it to its manifest.

    python -m smi_kernels.aot --arch 75 80 90

A kernel that spills, or that no longer loads asynchronously, gives right numbers at a fraction of the speed, and no
test of numbers sees it. Exit codes: 0 every kernel keeps its manifest, 1 one does not, 2 bad usage.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smi_kernels.errors import InputError, unknown_name
from smi_kernels.manifest import Variant
from smi_kernels.registry import load_kernel

SHIPPED = "smi_kernels.manifest:variants"

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


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _gate(options)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m smi_kernels.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", nargs="+", default=["80", "90"], metavar="N", help="compute capabilities, such as 90")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="kernels, or files of kernels, to compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements here too")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that compile  [default: 1]")
    parser.add_argument(
        "--manifest", default=SHIPPED, metavar="MODULE:FUNCTION", help="of kernels  [default: the shipped one]"
    )
    return parser


def _gate(options: argparse.Namespace) -> int:
    archs = [_arch(name) for name in dict.fromkeys(options.arch)]
    if options.jobs < 1:
        raise InputError(f"--jobs is {options.jobs}. It must be 1 or more.")
    _check_triton()
    tasks = _tasks(options.manifest, archs, options.only)
    start = time.perf_counter()
    widths = [max(len(getattr(task, name)) for task in tasks) for name in ("kernel", "variant")]
    print(_row(widths, "kernel", "variant", "arch", "registers", "shared", "stack", "spill", "cp.async"), flush=True)
    results = []
    for result in _compile_all(tasks, options.jobs):
        results.append(result)
        print(_line(widths, result), flush=True)
    _write_json(options.json, results)
    broken = [result for result in results if result.breaches]
    print(f"\n{len(results)} compiled in {time.perf_counter() - start:.0f} s, {len(broken)} broke the manifest.")
    for line in _summary(broken):
        print(line)
    return 1 if broken else 0


def _summary(broken: Iterable[Measured]) -> Iterator[str]:
    """A line for each kernel and way to break the manifest, with the architectures on which it happens."""
    archs: dict[tuple[str, str, str], list[str]] = {}
    for result in broken:
        task = result.task
        archs.setdefault((task.kernel, task.variant, "; ".join(result.breaches)), []).append(f"sm_{task.arch}")
    for (kernel, variant, breaches), where in archs.items():
        yield f"  {kernel} ({variant}) on {', '.join(where)}: {breaches}"


def _arch(name: str) -> int:
    if name not in map(str, SHARED_MEMORY):
        raise unknown_name("compute capability", name, map(str, SHARED_MEMORY))
    return int(name)


def _check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise InputError("Triton is not installed, so no kernel can be compiled. Triton exists for Linux only.")
    from triton import knobs

    if knobs.runtime.interpret:
        raise InputError(
            "TRITON_INTERPRET is set. Interpreted kernels cannot be compiled in the same process. "
            "Run again without it: env -u TRITON_INTERPRET python -m smi_kernels.aot"
        )


@functools.cache
def _load_manifest(reference: str) -> tuple[Variant, ...]:
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"The manifest {reference!r} cannot be loaded: {error}. Write module:function.") from error
    return tuple(function())


def _tasks(manifest: str, archs: Iterable[int], only: Sequence[str] | None) -> list[Task]:
    entries = [(index, variant, variant.kernel_name) for index, variant in enumerate(_load_manifest(manifest))]
    allowed = {alias for _, _, kernel in entries for alias in _aliases(kernel)}
    for name in only or ():
        if name not in allowed:
            raise unknown_name("kernel", name, allowed)
    tasks = [
        Task(manifest=manifest, index=index, arch=arch, kernel=kernel, variant=variant.name)
        for index, variant, kernel in entries
        for arch in archs
        if (variant.archs is None or arch in variant.archs) and (only is None or _aliases(kernel) & set(only))
    ]
    if not tasks:
        raise InputError("The manifest has nothing to compile for that. Try other values of --arch and --only.")
    if len({(task.kernel, task.variant, task.arch) for task in tasks}) < len(tasks):
        raise InputError(f"The manifest {manifest!r} has two variants of the same name. Names must be unique.")
    return tasks


def _aliases(kernel: str) -> set[str]:
    return {kernel, *kernel.split(".")}


def _compile_all(tasks: Sequence[Task], jobs: int) -> Iterator[Measured]:
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
    variant = _load_manifest(task.manifest)[task.index]
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


def _line(widths: Sequence[int], result: Measured) -> str:
    task, cost = result.task, result.resources
    cells = ["-"] * 5
    if cost is not None:
        numbers = (cost.registers, cost.shared_bytes, cost.stack_bytes, cost.spill_bytes)
        cells = [*map(str, numbers), "yes" if cost.cp_async else "no"]
    line = _row(widths, task.kernel, task.variant, f"sm_{task.arch}", *cells)
    return f"{line}  BROKEN" if result.breaches else line


def _row(widths: Sequence[int], kernel: str, variant: str, arch: str, *numbers: str) -> str:
    return f"{kernel:<{widths[0]}}  {variant:<{widths[1]}}  {arch:<5}" + "".join(f"{n:>10}" for n in numbers)


def _write_json(path: Path | None, results: Sequence[Measured]) -> None:
    if path is None:
        return
    import triton

    record = {"triton": triton.__version__, "kernels": [asdict(result) for result in results]}
    try:
        path.write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}. Choose another file for --json.") from error


if __name__ == "__main__":
    sys.exit(main())
