"""Measure on the GPU at hand how each convolution is run fastest, and write the device's configuration.

    python -m smi_kernels.tune

times our convolution with each of `TILES`, and the vendor's library, on the layers of the benchmark's models in
bfloat16, and writes ``tune/configs/<device>.json`` (with the date and versions), which is read from then on. Compiling
takes a minute or two on 16 cores.
"""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version

import click
import torch

from smi_kernels.tune.choices import FOLDER, HALF, file_name
from smi_kernels.tune.measure import NAMES, TILES, Problem, compile_all, measure, problems


@click.command(help=__doc__)
@click.option("--force", is_flag=True, help="Replace the device's configuration.")
@click.option("--jobs", type=click.IntRange(1), default=lambda: os.cpu_count() or 1, show_default="processors",
              help="Processes that compile.")  # fmt: skip
def main(force: bool, jobs: int) -> None:
    """Measure, and write the configuration."""
    if not torch.cuda.is_available():
        raise click.UsageError("There is no CUDA device here. A configuration holds measurements of one.")
    device = torch.cuda.get_device_name()
    target = FOLDER / f"{file_name(device)}.json"
    if target.exists() and not force:
        raise click.UsageError(f"{target} exists. Replace it with --force.")
    compile_all(jobs)
    torch.backends.cudnn.benchmark = True  # the library at its best
    rows = []
    for name, module, size, n in problems():
        problem = Problem(module, size, n, "cuda")
        for kind in TILES:
            row = measure(problem, kind)
            tile = "×".join(str(row["tile"][name]) for name in NAMES[:3])
            other = "library_seconds" if kind == HALF else "perturb_seconds"
            took = f"{row['seconds']:.2e} s, {other} {row[other]:.2e}"
            click.echo(f"{name} {list(module.weight.shape)} N={n} {kind}: {tile} {took}")
            rows.append(row)
    measured = {
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
    }
    fresh = target.with_suffix(".tmp")
    fresh.write_text(json.dumps({"measured": measured, "convolutions": rows}, indent=1) + "\n")
    fresh.replace(target)
    click.echo(f"Wrote {target}.")


if __name__ == "__main__":
    main()
