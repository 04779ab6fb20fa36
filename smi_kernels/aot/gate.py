"""The ahead-of-time gate: compiles every shipped kernel for GPUs that are not there, and holds it to its manifest.

    python -m smi_kernels.aot --arch 75 80 90

A kernel that spills, or that no longer loads asynchronously, gives right numbers at a fraction of the speed, and no
test of numbers sees it. Exit codes: 0 every kernel keeps its manifest, 1 one does not, 2 bad usage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from smi_kernels.aot.compiling import SHARED_MEMORY, Measured, Task, compile_all, load_manifest
from smi_kernels.errors import InputError, unknown_name

SHIPPED = "smi_kernels.aot.shipped:variants"


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
    for result in compile_all(tasks, options.jobs):
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


def _tasks(manifest: str, archs: Iterable[int], only: Sequence[str] | None) -> list[Task]:
    entries = [(index, variant, variant.kernel_name) for index, variant in enumerate(load_manifest(manifest))]
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
