"""What the commands share: options, and how errors become exit codes."""

from __future__ import annotations

import errno
import math
import signal
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from smi.runtime.signals import Stopped, stoppable
from smi.runtime.threads import limit_threads, usable_cores, use_threads

Command = TypeVar("Command", bound=Callable[..., Any])
PRECISIONS = ["auto", "float32", "bfloat16", "float16"]  # smi.runtime.precision.PRECISIONS, without torch
PER_CLASS = 30  # reconstructions of a class
NOT_OURS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG)


class BadInput(click.ClickException):
    """Bad input, told to a person."""

    exit_code = 2


class Commands(click.Group):
    """A group that turns `InputError` and a full or read-only disk into a message and exit code 2.

    Ctrl-C ends with 130, SIGTERM with 143.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command."""
        try:
            with stoppable():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            click.echo("Interrupted.", err=True)
            ctx.exit(128 + (stop.signal if isinstance(stop, Stopped) else signal.SIGINT))
        except OSError as error:
            if error.errno not in NOT_OURS:
                raise
            raise BadInput(f"{error.filename or 'The output'} cannot be read or written: {error.strerror}.") from error
        except ValueError as error:
            from smi.errors import InputError

            if not isinstance(error, InputError):
                raise
            raise BadInput(str(error)) from error


def common(command: Command) -> Command:
    """The options that every command has. ``--threads`` and ``--precision`` are dealt with here, around the command."""

    @wraps(command)
    def prepared(*args: Any, threads: int | None, device: str, precision: str, **options: Any) -> Any:
        from smi.runtime.precision import precision as computing_in

        check_device(device)
        limit_threads() if threads is None else use_threads(threads)
        with computing_in(precision):
            return command(*args, device=device, **options)

    for option in (
        click.option("--threads", type=click.IntRange(1, 1024), help="Of the CPU.  [default: OMP_NUM_THREADS, where "
                     f"that is set; else 1 for a small model, {usable_cores()} for others, the cores usable here]"),
        click.option("--precision", type=click.Choice(PRECISIONS), default="auto",
                     show_default=True, help="Number format of the models; auto: bfloat16 where it is quick. "
                     "float16 without loss scaling."),
        click.option("--device", type=click.Choice(["cpu", "cuda", "mps"]), default="cpu", show_default=True,
                     help="Where the models run."),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
                     help="Of everything random."),
    ):  # fmt: skip
        prepared = option(prepared)
    return prepared  # type: ignore[return-value]


def suspect_options(command: Command) -> Command:
    """What a file does not say of its model, handed on as ``form``: the keywords of `smi.load_suspect`."""

    @wraps(command)
    def prepared(
        *args: Any, arch: str | None, mean: str | None, std: str | None, classes: str | None, size: str | None,
        bgr: bool, grey: bool, **options: Any,
    ) -> Any:  # fmt: skip
        if arch and ".py:" in arch:
            click.echo("running {0[0]} for its function {0[2]}".format(arch.rpartition(":")), err=True)
        form = {
            "arch": arch, "mean": _numbers("--mean", mean), "std": _numbers("--std", std), "classes": _words(classes),
            "size": _size(size), "bgr": bgr, "grey": grey,
        }  # fmt: skip
        return command(*args, form=form, **options)

    for option in (
        click.option("--grey", is_flag=True, help="The model takes grey images, as three equal channels."),
        click.option("--bgr", is_flag=True, help="The model takes blue first."),
        click.option("--size", metavar="N|HxW", help="Resize images to what the model takes."),
        click.option("--classes", metavar="A,B,...|FILE", help="Names of the classes, or a file with one a line."),
        click.option("--std", metavar="X[,Y,Z]", help="Of the normalisation, like --mean."),
        click.option("--mean", metavar="X[,Y,Z]", help="Of the normalisation that the model was trained with, of "
                     "pixels in [0, 1]; --mean 0 --std 1 for none."),
        click.option("--arch", help="A state dict's architecture: a name of smi or torchvision, timm/NAME, or "
                     "FILE.py:factory, which runs your FILE."),
    ):  # fmt: skip
        prepared = option(prepared)
    return prepared  # type: ignore[return-value]


def generator_options(command: Command) -> Command:
    """What a file of a generator's weights does not say, handed on as ``own``: keywords of `smi.load_generator`."""

    @wraps(command)
    def prepared(*args: Any, generator: str | None, latent_dim: int | None, limits: str | None, **options: Any) -> Any:
        from smi.errors import InputError

        if generator is None:
            if latent_dim is not None or limits is not None:
                raise InputError("--latent-dim and --range are for --generator, a generator of your own. Say it, too.")
            return command(*args, own=None, **options)
        if latent_dim is None:
            raise InputError("--generator needs --latent-dim, the length of its latents.")
        low, high = _pair("--range", limits or "-1,1")
        own = {"architecture": generator, "latent_dim": latent_dim, "output_range": (low, high)}
        return command(*args, own=own, **options)

    for option in (
        click.option("--range", "limits", metavar="LOW,HIGH", help="Of the values that it puts out.  [default: -1,1]"),
        click.option("--latent-dim", type=click.IntRange(1), help="Length of its latents."),
        click.option("--generator", help="FILE.py:function that makes a generator of your own, whose weights --prior "
                     "names; runs your FILE."),
    ):  # fmt: skip
        prepared = option(prepared)
    return prepared  # type: ignore[return-value]


def force_option(command: Command) -> Command:
    """Whether results may be replaced."""
    return click.option("--force", is_flag=True, help="Replace what is there.")(command)


def resume_option(command: Command) -> Command:
    """Whether to go on with work that was stopped."""
    return click.option("--resume", is_flag=True, help="Go on where the same command was stopped.")(command)


def data_options(command: Command) -> Command:
    """Where torchvision's data sets lie, and whether they may be fetched."""
    command = click.option("--download", is_flag=True, help="Allow torchvision's data sets to be downloaded.")(command)
    return click.option("--root", default="data", show_default=True, help="Folder of torchvision's data sets.")(command)


def _numbers(option: str, text: str | None) -> list[float] | None:
    from smi.errors import InputError

    if text is None:
        return None
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} is {text!r}. Allowed: a number, or one a channel: 0.485,0.456,0.406.") from error
    if not all(math.isfinite(value) and (value > 0 or option == "--mean") for value in values):
        raise InputError(f"{option} is {text!r}. Allowed: finite numbers{', above zero' if option == '--std' else ''}.")
    return values


def _pair(option: str, text: str) -> tuple[float, float]:
    from smi.errors import InputError

    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} is {text!r}. Allowed: two numbers, such as 0,1 or -1,1.") from error
    return low, high


def _words(text: str | None) -> list[str] | None:
    from smi.errors import InputError

    if text is None:
        return None
    try:
        if not Path(text).is_file():
            return [name.strip() for name in text.split(",")]
        return [line.strip() for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:  # of UTF-8, too
        raise InputError(f"--classes names {text!r}, which cannot be read as UTF-8 text ({error}).") from error


def _size(text: str | None) -> tuple[int, int] | None:
    from smi.errors import InputError

    if text is None:
        return None
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.isdecimal() and 8 <= int(part) <= 2048 for part in parts):
        raise InputError(f"--size is {text!r}. Allowed: pixels from 8 to 2048, N or HxW.")
    return int(parts[0]), int(parts[-1])


def check_device(device: str) -> None:
    """Raises `InputError` for a device that torch does not find here."""
    import torch

    from smi.errors import InputError

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[device]:
        found = ", ".join(name for name, is_there in there.items() if is_there)
        raise InputError(f"--device is {device!r}, which torch does not find here. Allowed: {found}.")
