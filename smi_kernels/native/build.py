"""The library of `noise.c` and `conv.c`, built by the user's compiler when it is first needed."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c11", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
SOURCES = {"noise.c": "-ffp-contract=off", "conv.c": "-ffp-contract=fast"}
"""Files, and whether a product and a sum may be one operation: in noise they may not, or its bits would change."""

ATTEMPTS = ((tuple(SOURCES), ("-fopenmp",)), (tuple(SOURCES), ()), (("noise.c",), ()))
"""Files and further options, tried in this order. With OpenMP the threads are torch's own; without, it is one."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, built and loaded; None where that is impossible or was not wanted."""
    if os.environ.get("SMI_KERNELS_NATIVE") == "0":
        return None
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.name != "posix":
        return None
    for sources, options in ATTEMPTS:
        try:
            return ctypes.CDLL(str(_built(compiler, sources, options)))
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _built(compiler: str, sources: tuple[str, ...], options: tuple[str, ...]) -> Path:
    """Path of the compiled library, from the cache if this source was built before for such a processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    flags = {name: (*FLAGS, *options, SOURCES[name]) for name in sources}
    parts = (*((FOLDER / name).read_bytes() for name in sources), repr((compiler, flags)).encode(), version)
    target = _cache() / f"kernels-{hashlib.sha256(b'|'.join((*parts, _processor()))).hexdigest()[:24]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            objects = {name: f"{folder}/{name}.o" for name in sources}
            for name, made in objects.items():
                _run(compiler, *flags[name], "-c", str(FOLDER / name), "-o", made)
            fresh = Path(folder) / "kernels.so"
            _run(compiler, "-shared", *options, *objects.values(), "-o", str(fresh), "-lm")
            fresh.replace(target)  # atomic, so that processes that build at once do not harm each other
    return target


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True, timeout=120)


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
