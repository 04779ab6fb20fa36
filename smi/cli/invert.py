"""``smi fit-prior`` and ``smi invert``: a generator of public images, and reconstructions through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from smi.cli.inputs import prior_for, public_as, wrote
from smi.cli.options import (
    PER_CLASS,
    common,
    data_options,
    force_option,
    generator_options,
    resume_option,
    suspect_options,
)


@click.command("fit-prior", short_help="Train a prior on public images.")
@click.argument("public")
@click.option("--steps", type=click.IntRange(min=1), help="Generator steps.  [default: 4000]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File, new.")
@force_option
@resume_option
@data_options
@common
def fit_prior_command(
    public: str, steps: int | None, out: Path, force: bool, resume: bool, root: str, download: bool, seed: int,
    device: str,
) -> None:  # fmt: skip
    """Train a prior (a generator and a critic) on PUBLIC images: a domain's name, an .npz or a folder of images.

    What is stopped goes on with --resume.

    \b
    Example:
      smi fit-prior digits --steps 4000 --out prior.safetensors
    """
    from smi.priors.base import SIZE, save_prior
    from smi.priors.gan import PriorConfig, fit_prior
    from smi.runtime.files import claimed
    from smi.runtime.unfinished import workplace

    with claimed(out, force=force) as file:
        images = public_as(public, (None, SIZE, SIZE), root, download)
        config = PriorConfig() if steps is None else PriorConfig(steps=steps)
        with workplace(file, resume=resume, force=force) as work:
            prior = fit_prior(images, config, seed=seed, device=device, checkpoint=work / "prior.safetensors")
            save_prior(prior, file)
        wrote([file])


@click.command(short_help="Reconstruct images of every class.")
@click.argument("model")
@click.option("--prior", "prior_name", required=True, help='"digits", or a file from smi fit-prior.')
@generator_options
@click.option("--method", default="smi", show_default=True, help="smi, latent or pixel.")
@click.option("--per-class", type=click.IntRange(min=1), default=PER_CLASS, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help=".npz, new; a .png is written beside it.")
@force_option
@resume_option
@suspect_options
@common
def invert(
    model: str, prior_name: str, own: dict[str, Any] | None, method: str, per_class: int, out: Path, force: bool,
    resume: bool, form: dict[str, Any], seed: int, device: str,
) -> None:  # fmt: skip
    """Reconstruct images of every class of MODEL.

    Writes images (uint8, NHWC), labels and stability scores as .npz, and a picture of some of them beside it.

    \b
    Example:
      smi invert suspect.safetensors --prior digits --method smi --per-class 30 --out images.npz
    """
    from dataclasses import replace

    from smi.domains.arrays import save_samples
    from smi.inversion import inversions, invert as run_inversion
    from smi.inversion.selection import Selection, score_samples
    from smi.models.suspects import load_suspect
    from smi.plotting.report import reconstructions
    from smi.runtime.files import claimed, write_atomic
    from smi.runtime.unfinished import workplace

    chosen = inversions[method]()
    place = _suffixed(out, ".npz")
    with claimed(place, force=force) as file, claimed(out.with_suffix(".png"), force=force) as sheet:
        suspect = load_suspect(model, **form).to(device)
        prior = prior_for(prior_name, suspect.channels, own)
        # Baselines keep what they make, as in the demo; choosing by stability is part of the stabilised method.
        selection = Selection() if method == "smi" else None
        with workplace(file, resume=resume, force=force) as work:
            samples = run_inversion(
                suspect.model, prior, chosen,
                per_class=per_class, selection=selection, seed=seed, checkpoint=work / "inversion.safetensors",
            )  # fmt: skip
            samples = replace(samples, scores=score_samples(suspect.model, samples, seed=seed))
            labels = range(min(len(suspect.classes), 20))
            picture = reconstructions(samples, suspect.classes, labels, shown=min(per_class, 8))
            save_samples(file, samples)
            write_atomic(sheet, picture)
        wrote([file, sheet])


def _suffixed(path: Path, suffix: str) -> Path:
    from smi.errors import InputError

    if path.suffix != suffix:
        raise InputError(f"--out is {str(path)!r}. Allowed: a name that ends in {suffix}.")
    return path
