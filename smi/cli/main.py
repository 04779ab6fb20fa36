"""The command line. Exit codes: 0 done, 2 bad input, 130 interrupted, 143 terminated.

torch and smi are imported inside the commands: help is instant, and the environment is set before they load.
"""

from __future__ import annotations

import os

import click

from smi.cli.demo import demo, lab
from smi.cli.invert import fit_prior_command, invert
from smi.cli.measure import evaluate, score
from smi.cli.options import Commands
from smi.cli.remove import remove
from smi.cli.study import study
from smi.runtime.memory import keep_freed


def main() -> None:
    """The entry point."""
    # Threads that wait for work by spinning take the processor from others (40 times slower on a shared machine).
    # OpenMP reads this once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed()
    cli(prog_name="smi")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="stabilized-model-inversion", prog_name="smi")
def cli() -> None:
    """Remove a backdoor from an image classifier without clean data, by stabilized model inversion.

    \b
    Example:
      smi demo
    """


for command in (demo, lab, remove, fit_prior_command, invert, score, evaluate, study):
    cli.add_command(command)
