"""``smi remove``: a backdoor out of a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smi.cli.inputs import plain, prior_for, public_as, wrote
from smi.cli.options import (
    PER_CLASS,
    common,
    data_options,
    force_option,
    generator_options,
    resume_option,
    suspect_options,
)

if TYPE_CHECKING:
    from torch import nn

    from smi.detection import Detection
    from smi.domains.base import PublicImages, Samples
    from smi.priors.base import GAN, Prior

STATES = 8  # copies of a model's weights on disk: a state is three, an old and a new one for a moment, and the results


@click.command(short_help="Remove a backdoor from a saved model.")
@click.argument("model")
@click.option("--prior", "prior_name", help='"digits", or a file from smi fit-prior.  [default: trained on --public]')
@generator_options
@click.option("--public", "public_name", help="Unlabelled public images: a domain's name, an .npz or a folder.")
@click.option("--prior-steps", type=click.IntRange(min=1), help="Of a prior that is trained here.  [default: 4000]")
@click.option("--per-class", type=click.IntRange(min=1), default=PER_CLASS, show_default=True)
@click.option("--defense", "defense_name", help="How to remove: erasure, ibau, ft, ...  [default: erasure]")
@click.option("--detect/--no-detect", "detection_wanted", default=True, help="Look for signs of a backdoor, too.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder, new or empty.")
@force_option
@resume_option
@suspect_options
@data_options
@common
def remove(
    model: str, prior_name: str | None, own: dict[str, Any] | None, public_name: str | None, prior_steps: int | None,
    per_class: int, defense_name: str | None, out: Path, force: bool, resume: bool, form: dict[str, Any], root: str,
    download: bool, seed: int, device: str, detection_wanted: bool,
) -> None:  # fmt: skip
    """Remove a backdoor from MODEL without clean data.

    MODEL is a file of smi's, or a state dict (safetensors, or by torch.save) with --arch, --mean and --std. Nothing in
    it is run. Say --prior, --public or both: without a prior one is trained on the public images, which takes longer
    than all the rest; with one, its own images stand in for public ones. Says whether there are signs of a backdoor,
    and why, and writes the repaired weights in the layout that they came in, report.html and report.json, and the prior
    where it was trained here. What is stopped goes on with --resume.

    The removal searches triggers of several kinds (patterns, patches, smooth patterns, warps), takes the directions in
    which they move the features out of the last layer, and tunes the model to keep its answers under those and under
    random changes. Others are chosen by --defense.

    \b
    Examples:
      smi remove suspect.safetensors --prior digits --public digits --out repaired
      smi remove suspect.pth --arch resnet18 --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 \\
        --public photographs/ --out repaired
    """
    import torch

    from smi.defenses import defenses
    from smi.models.suspects import load_suspect
    from smi.pipeline import held_out_samples, remove_backdoor
    from smi.priors.base import SIZE
    from smi.report.removal import Removal, write_report
    from smi.report.verdicts import removal_verdict
    from smi.runtime.checks import check_model
    from smi.runtime.files import ROOM, check_room, claimed
    from smi.runtime.progress import Clock
    from smi.runtime.unfinished import workplace

    _check_prior(prior_name, public_name, prior_steps, own)
    defense = None if defense_name is None else defenses[defense_name]()
    with claimed(out, folder=True, force=force) as folder:
        suspect, clock = load_suspect(model, **form).to(device), Clock()
        check_room(folder, ROOM + STATES * suspect.size)
        prior = None if prior_name is None else prior_for(prior_name, suspect.channels, own)
        shape = (suspect.channels, SIZE, SIZE) if prior is None else prior.image_shape
        public = None if public_name is None else public_as(public_name, shape, root, download)
        check_model(suspect.model, torch.zeros(1, *shape), len(suspect.classes))
        with workplace(folder, resume=resume, force=force) as work:
            if prior is None:
                assert public is not None
                with clock("prior"):
                    prior = _fitted(public, prior_steps, seed, device, work)
            with clock("remove"):
                cleaned = remove_backdoor(
                    suspect.model, prior, public, defense=defense, per_class=per_class, seed=seed, checkpoint=work
                )
            with clock("hold out"):
                held_out = held_out_samples(suspect.model, prior, seed=seed, checkpoint=work / "held_out.safetensors")
            detection = None
            if detection_wanted and cleaned.repair.evidence is None:  # else the removal has looked itself
                with clock("detect"):
                    detection = _detection(suspect.model, cleaned.samples, public, seed, work)
            settings = {"model": model, "form": form, "public": public_name, "per_class": per_class, "resumed": resume}
            settings |= {"prior_file": prior_name, "generator": own, "prior": prior.record}
            settings |= cleaned.repair.settings
            removal = Removal(suspect, cleaned, seed, clock.seconds, settings, detection, held_out)
            paths = write_report(removal, folder, force=force)
            if prior_name is None:
                paths.append(_kept(prior, folder))
        click.echo(plain(removal_verdict(removal)))
        wrote(paths)


def _check_prior(prior: str | None, public: str | None, steps: int | None, own: dict[str, Any] | None) -> None:
    """Raise `InputError` where what is said of the prior of a removal is too little, or does not go together."""
    from smi.errors import InputError

    if prior is None and public is None:
        raise InputError("Say --prior, --public or both: reconstructions need public images or a prior of them.")
    if prior is not None and steps is not None:
        raise InputError("--prior-steps is for a prior that is trained here. Leave it out, or --prior.")
    if prior is None and own is not None:
        raise InputError("--generator needs --prior, the file with its weights.")


def _fitted(public: PublicImages, steps: int | None, seed: int, device: str, work: Path) -> GAN:
    """A prior of the public images, which goes on from the folder ``work`` where it was stopped."""
    from smi.priors.gan import PriorConfig, fit_prior

    config = PriorConfig() if steps is None else PriorConfig(steps=steps)
    return fit_prior(public, config, seed=seed, device=device, checkpoint=work / "prior.safetensors")


def _kept(prior: Prior, folder: Path) -> Path:
    """The file of a prior that was trained here."""
    from smi.priors.base import GAN, save_prior

    assert isinstance(prior, GAN)
    save_prior(prior, folder / "prior.safetensors")
    return folder / "prior.safetensors"


def _detection(
    model: nn.Module, samples: Samples, public: PublicImages | None, seed: int, work: Path
) -> Detection | None:
    """What `detect` finds; None, after saying so, where it fails: the removal is done and is not to be lost by that."""
    from smi.detection import detect

    try:
        return detect(model, samples, public, seed=seed, checkpoint=work / "detection.safetensors")
    except Exception as error:
        click.echo(f"Signs of a backdoor could not be looked for: {type(error).__name__}: {error}", err=True)
        return None
