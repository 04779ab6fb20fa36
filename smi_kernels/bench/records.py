"""Records: one for each variant at each point of the grid, their ratios, and the files that they go to."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import torch

from smi_kernels.errors import InputError

OURS, CEILING, EAGER = "smi", "ceiling", "eager"
PEERS = (EAGER, "compiled", "vmap", "grouped")


class Record(TypedDict):
    """One variant at one point.

    Attributes:
        model: name in `smi_kernels.bench.models.ARCHITECTURES`.
        n: images.
        k: draws.
        family: noise on the parameters; None for the ceiling, which has none.
        variant: ``smi`` (ours), a name in `PEERS`, or ``ceiling``.
        dtype: format of the model's body.
        seconds: median over the repeats of the time of one call.
        spread: interquartile range / median.
        peak_bytes: most memory during a call above what was in use before it; see `measure.peak_bytes`.
        error: max |s − r| / (r + 1e-4) over the first 64 images, r in float64 with the same noise. None for peers,
            which draw other noise.
        vs_eager: seconds of eager / own seconds: above 1 is faster than eager. Every variant has the ratios.
        vs_best_peer: seconds of the fastest in `PEERS` / own seconds; None if no peer ran.
        of_ceiling: seconds of the ceiling / own seconds, the share of the ceiling's speed.
    """

    model: str
    n: int
    k: int
    family: str | None
    variant: str
    dtype: str
    seconds: float
    spread: float
    peak_bytes: int
    error: float | None
    vs_eager: float | None
    vs_best_peer: float | None
    of_ceiling: float | None


def fill_ratios(point: Sequence[Record]) -> None:
    """Set the ratios of all records of one point. The peers draw Gaussian noise, whatever the family of ours."""
    peers = {r["variant"]: r["seconds"] for r in point if r["variant"] in PEERS}
    ceiling = next((r["seconds"] for r in point if r["variant"] == CEILING), None)
    for record in point:
        own = record["seconds"]
        record["vs_eager"] = peers[EAGER] / own if EAGER in peers else None
        record["vs_best_peer"] = min(peers.values()) / own if peers else None
        record["of_ceiling"] = None if ceiling is None else ceiling / own


def summary(records: Iterable[Record]) -> list[str]:
    """For each family of ours: geometric mean and minimum of the ratios, over all points."""
    ours = [r for r in records if r["variant"] == OURS]
    lines = []
    for family in dict.fromkeys(r["family"] for r in ours):
        parts = []
        for name, ratio in [("eager", "vs_eager"), ("best peer", "vs_best_peer"), ("ceiling", "of_ceiling")]:
            values = [v for r in ours if r["family"] == family and (v := r[ratio]) is not None]  # type: ignore[literal-required]
            if values:
                mean = math.exp(sum(map(math.log, values)) / len(values))
                parts.append(f"{name} geometric mean {mean:.2f}, minimum {min(values):.2f}")
        lines.append(f"smi {family}, speed relative to: {'; '.join(parts) or 'nothing'}")
    return lines


HEADER = (
    f"{'variant':<22}{'dtype':<10}{'ms':>10}{'spread':>8}{'peak MB':>9}"
    f"{'error':>9}{'vs eager':>10}{'vs best':>9}{'of ceil.':>9}"
)


def row(record: Record) -> str:
    """A line of the table under `HEADER`."""
    name = f"{record['variant']} {record['family']}" if record["variant"] == OURS else record["variant"]
    error = "" if record["error"] is None else f"{record['error']:.1e}"
    ratios = [record["vs_eager"], record["vs_best_peer"], record["of_ceiling"]]
    cells = ["" if value is None else f"{value:.2f}" for value in ratios]
    return (
        f"{name:<22}{record['dtype']:<10}{1e3 * record['seconds']:>10.2f}{record['spread']:>8.0%}"
        f"{record['peak_bytes'] / 1e6:>9.1f}{error:>9}{cells[0]:>10}{cells[1]:>9}{cells[2]:>9}"
    )


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: processor, threads, GPU, versions, date."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "system": platform.platform(),
    }
    commit = _output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    if commit:
        facts["commit"] = commit
    if device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _triton() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def sidecar(file: Path) -> Path:
    """Where the machine is described: ``a.json`` to ``a.machine.json``."""
    return file.with_suffix(".machine.json")


def check_outputs(files: Iterable[Path], *, force: bool) -> None:
    """Raise `InputError` for a file that exists, unless forced, or whose folder does not, before hours are spent."""
    for file in files:
        if file.exists() and not force:
            raise InputError(f"{file} exists. Nothing is overwritten: choose another name, or pass --force.")
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise InputError(f"{file} cannot be written: it must be a file in a folder that exists.")


def write_json(file: Path, content: object) -> None:
    """Write JSON, all of it or nothing."""
    write_atomic(file, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def write_atomic(file: Path, data: bytes) -> None:
    """Write to a temporary file beside, then rename, so that an interrupted run leaves the last whole file."""
    handle, temporary = tempfile.mkstemp(dir=file.absolute().parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
