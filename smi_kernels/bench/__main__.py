"""The command line of the benchmark. Exit codes: 0 done, 2 bad input, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from smi_kernels.bench.models import ARCHITECTURES
from smi_kernels.bench.plot import check_plot, plot
from smi_kernels.bench.records import HEADER, Record, check_outputs, machine, row, sidecar, summary, write_json
from smi_kernels.bench.run import SIGMA_W, SIGMA_X, Grid, Notes, measure, our_families
from smi_kernels.errors import InputError

PATH = click.Path(path_type=Path, dir_okay=False)
POSITIVE = click.IntRange(min=1)
FULL: dict[str, Any] = {"models": tuple(ARCHITECTURES), "n": (16, 64, 256), "k": (8, 32), "repeats": 5}
QUICK: dict[str, Any] = {"models": ("small_cnn", "small_vgg"), "n": (16, 64), "k": (8,), "repeats": 7}
NAMES = click.Choice(list(ARCHITECTURES))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, or cuda:1.")
@click.option("--quick", is_flag=True, help="The two small models, N = 16 and 64, K = 8: minutes on a CPU.")
@click.option("--models", multiple=True, type=NAMES, help="Models instead of all; may be repeated.")
@click.option("--n", "ns", multiple=True, type=POSITIVE, help="Images instead of 16, 64, 256; may be repeated.")
@click.option("--k", "ks", multiple=True, type=POSITIVE, help="Draws instead of 8, 32; may be repeated.")
@click.option("--repeats", type=POSITIVE, help="Rounds.  [default: 5; 7 with --quick]")
@click.option("--threads", type=POSITIVE, help="Of the CPU.  [default: torch's]")
@click.option("--compile/--no-compile", "compiler", default=True, show_default=True, help="With torch.compile.")
@click.option("--json", "json_file", type=PATH, help="Where records go; the machine goes to *.machine.json beside.")
@click.option("--plot", "plot_file", type=PATH, help="Where a plot goes: .png, .svg or .pdf.")
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
def main(
    device: str,
    quick: bool,
    models: tuple[str, ...],
    ns: tuple[int, ...],
    ks: tuple[int, ...],
    repeats: int | None,
    threads: int | None,
    compiler: bool,
    json_file: Path | None,
    plot_file: Path | None,
    force: bool,
) -> None:
    """Time the stability scores beside the ways a user would otherwise compute them.

    All are warmed up, tuned and measured in turns in the same minutes. Times include the noise. Files are written
    after every point, so that Ctrl-C keeps what was measured.

    \b
    Example:
      python -m smi_kernels.bench --quick --json quick.json --plot quick.svg
    """
    try:
        _check_files(json_file, plot_file, force)
        place = _device(device)
    except InputError as error:
        raise click.UsageError(str(error)) from error
    if threads is not None:
        torch.set_num_threads(threads)
    preset = QUICK if quick else FULL
    given = {"models": models, "n": ns, "k": ks, "repeats": repeats}
    grid = Grid(**preset | {name: v for name, v in given.items() if v}, device=place, compiler=compiler)
    try:
        _run(grid, json_file, plot_file)
    except KeyboardInterrupt:
        click.echo("Interrupted. The files hold the points that were measured.", err=True)
        sys.exit(130)


def _check_files(json_file: Path | None, plot_file: Path | None, force: bool) -> None:
    """Before anything is measured."""
    files = [file for file in (json_file, plot_file) if file is not None]
    if json_file is not None:
        files.append(sidecar(json_file))
    if len(set(files)) < len(files):
        raise InputError("The files for records, machine and plot must have different names.")
    if plot_file is not None:
        check_plot(plot_file)
    check_outputs(files, force=force)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"Unknown device {name!r}. Allowed: cpu, cuda, cuda:0 and so on.") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"The benchmark does not know the device {name!r}. Allowed: cpu, cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"{name} is not there: torch sees {torch.cuda.device_count()} CUDA devices. Try --device cpu.")
    return device


def _run(grid: Grid, json_file: Path | None, plot_file: Path | None) -> None:
    torch.backends.cudnn.benchmark = True  # for ours as for the peers
    facts = machine(grid.device) | {"repeats": grid.repeats, "compile": grid.compiler}
    facts |= {"sigma_x": SIGMA_X, "sigma_w": SIGMA_W}
    records: list[Record] = []
    notes = Notes()
    where = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    click.echo(f"{where}; torch {facts['torch']}; sigma_x {SIGMA_X}, sigma_w {SIGMA_W}; {grid.repeats} rounds")
    bar = tqdm(total=_calls(grid), unit="call", disable=not sys.stderr.isatty(), leave=False)
    with bar, torch.no_grad():
        for point in measure(grid, notes, _progress(bar)):
            records += point
            bar.write(_table(point))
            if json_file is not None:
                write_json(json_file, records)
                write_json(sidecar(json_file), facts | vars(notes))
            if plot_file is not None:
                plot(records, plot_file, f"{where}, torch {facts['torch']}")
    for name, reason in notes.unavailable.items():
        click.echo(f"unavailable: {name}: {reason}")
    click.echo("\n".join(summary(records)))


def _calls(grid: Grid) -> int:
    variants = len(our_families()) + 4 + grid.compiler
    return len(grid.models) * len(grid.n) * len(grid.k) * grid.repeats * variants


def _progress(bar: tqdm) -> Callable[[str], None]:
    def step(what: str) -> None:
        if what:
            bar.set_description(what)
        else:
            bar.update()

    return step


def _table(point: list[Record]) -> str:
    first = point[0]
    title = f"\n{first['model']}, N={first['n']}, K={first['k']}"
    return "\n".join([title, HEADER, *map(row, sorted(point, key=lambda r: r["seconds"]))])


if __name__ == "__main__":
    main(prog_name="python -m smi_kernels.bench")
