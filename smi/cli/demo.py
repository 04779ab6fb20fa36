"""``smi demo`` and ``smi lab``: the first things to try."""

from __future__ import annotations

import os
from pathlib import Path

import click

from smi.cli.inputs import plain, wrote
from smi.cli.options import common, force_option

TRIES = 1000


@click.command(short_help="Plant a backdoor and remove it, on digits.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder, new or empty.  [default: smi-demo-SEED]")
@force_option
@common
def demo(seed: int, out: Path | None, force: bool, device: str) -> None:
    """Plant a backdoor in a classifier of handwritten digits, and remove it without clean data.

    Trains the victim, inverts it with the shipped prior, repairs it, and compares with the controls. Downloads
    nothing. Writes report.html, report.json and repaired.safetensors.

    \b
    Example:
      smi demo --seed 7 --out seven
    """
    from smi.demo import run_demo
    from smi.domains import load_domain
    from smi.priors.base import load_prior
    from smi.report.removal import table, write_report
    from smi.report.verdicts import verdict
    from smi.runtime.files import claimed

    with claimed(out or _free_folder(f"smi-demo-{seed}"), folder=True, force=force) as folder:
        prior = load_prior("digits")
        result = run_demo(load_domain("digits"), prior, seed=seed, device=device)
        paths = write_report(result, folder, force=force)
        click.echo(f"{table(result)}\n\n{plain(verdict(result))}")
        wrote(paths)


@click.command(short_help="Open the notebooks in JupyterLab.")
@click.option("--into", type=click.Path(path_type=Path), help="Work on a copy in this folder; files there stay.")
@click.option("--port", type=click.IntRange(0, 65535), default=8888, show_default=True, help="Or the next free one.")
@click.option("--browser/--no-browser", default=True, help="Open a browser, or print the address only.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def lab(into: Path | None, port: int, browser: bool, options: tuple[str, ...]) -> None:
    """Open the notebooks in JupyterLab, at the first one.

    Works on the notebooks of a checkout; from an installed package, on a copy in ./smi-notebooks, where files that are
    there already stay. Serves this machine only, with a token. Ctrl-C twice ends it. What stands after -- goes to
    JupyterLab.

    \b
    Examples:
      smi lab --into my-notebooks
      smi lab --no-browser -- --allow-root
    """
    import subprocess

    from smi.tutorial.lab import lab_command, notebooks_folder

    folder, copied = notebooks_folder(into)
    if copied:
        click.echo(f"copied {len(copied)} files to {folder}")
    command = [*lab_command(folder, port=port, browser=browser), *options]
    if os.name == "posix":  # JupyterLab takes this process over: signals reach it, and its exit code is ours
        os.execv(command[0], command)
    raise SystemExit(subprocess.run(command, check=False).returncode)


def _free_folder(name: str) -> Path:
    """``name``, or ``name-2`` and so on where there is one already."""
    return next(path for i in range(1, TRIES) if not (path := Path(name if i == 1 else f"{name}-{i}")).exists())
