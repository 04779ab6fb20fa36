"""What several commands read and say: the prior, public images, and what was written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from smi.domains.base import PublicImages
    from smi.priors.base import GAN, GeneratorPrior


def prior_for(name: str, channels: int, own: dict[str, Any] | None) -> GAN | GeneratorPrior:
    """The prior, checked against the model's channels.

    Args:
        name: Of a prior that ships, or a file.
        channels: That the model takes, 1 or 3.
        own: What is said of a generator of the user's, the keywords of `load_generator`; None for a prior of smi's.
    """
    from smi.errors import InputError
    from smi.priors.base import load_generator, load_prior

    if own is not None:
        path, _, function = own["architecture"].rpartition(":")
        click.echo(f"running {path} for its function {function}", err=True)
        return load_generator(name, **own).as_channels(channels)
    found = load_prior(name)
    if found.image_shape[0] != channels:
        raise InputError(
            f"The prior makes images with {found.image_shape[0]} channels; the model takes {channels}. Choose a prior "
            "of the model's kind of images, or train one: smi fit-prior."
        )
    return found


def public_as(name: str, shape: tuple[int | None, int, int], root: str, download: bool) -> PublicImages:
    """The public images as ``shape`` (C, or None for theirs, H, W), saying so where they are others."""
    from smi.domains import load_public

    public = load_public(name, root=root, download=download)
    given = tuple(public.images.shape[1:])
    wanted = (shape[0] or given[0], *shape[1:])
    if given == wanted:
        return public
    click.echo(f"public images {given} are used as {wanted} (channels, height, width)", err=True)
    return public.fitted(wanted)


def plain(text: str) -> str:
    """Text for any terminal: the page's typography undone."""
    return text.replace("\u00a0", " ").replace("“", '"').replace("”", '"')


def wrote(paths: list[Path]) -> None:
    """Say so."""
    for path in paths:
        click.echo(f"wrote {path}")
