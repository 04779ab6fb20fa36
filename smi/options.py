"""What the commands share: options, and how errors become exit codes."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


class BadInput(click.ClickException):
    """Bad input, told to a person."""

    exit_code = 2


class Commands(click.Group):
    """A group that turns `InputError` into a message and exit code 2, and Ctrl-C into 130."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)
        except ValueError as error:
            from smi.errors import InputError

            if not isinstance(error, InputError):
                raise
            raise BadInput(str(error)) from error


def cores() -> int:
    """Physical cores that this process may run on."""
    try:
        usable = os.sched_getaffinity(0)
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    try:
        return len({Path(siblings.format(cpu)).read_text() for cpu in usable})
    except OSError:
        return len(usable)


def common(command: Command) -> Command:
    """The options that every command has. ``--threads`` and ``--device`` are dealt with here, before the command."""

    @wraps(command)
    def prepared(*args: Any, threads: int, device: str, **options: Any) -> Any:
        import torch

        _check_device(device)
        torch.set_num_threads(threads)
        return command(*args, **options)

    for option in (
        click.option("--threads", type=click.IntRange(1, 1024), default=cores, show_default="physical cores"),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
                     help="So far the commands run on the CPU only."),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
                     help="Of everything random."),
    ):  # fmt: skip
        prepared = option(prepared)
    return prepared  # type: ignore[return-value]


def data_options(command: Command) -> Command:
    """Where torchvision's data sets lie, and whether they may be fetched."""
    command = click.option("--download", is_flag=True, help="Allow torchvision's data sets to be downloaded.")(command)
    return click.option("--root", default="data", show_default=True, help="Folder of torchvision's data sets.")(command)


def _check_device(device: str) -> None:
    import torch

    from smi.errors import InputError

    if device == "cuda":
        found = "there is one here" if torch.cuda.is_available() else "there is none here either"
        raise InputError(
            f"The commands do not use a CUDA device yet ({found}). Leave --device out, or say --device cpu."
        )
