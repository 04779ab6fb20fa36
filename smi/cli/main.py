"""The command line. Exit codes: 0 done, 2 bad input, 130 interrupted, 143 terminated.

torch and smi are imported inside the commands: help is instant, and the environment is set before they load.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smi.cli.options import (
    Commands,
    common,
    data_options,
    force_option,
    generator_options,
    resume_option,
    suspect_options,
)
from smi.cli.study import study
from smi.runtime.memory import keep_freed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from smi.detection import Detection
    from smi.domains.base import PublicImages, Samples
    from smi.priors.base import GAN, GeneratorPrior

PER_CLASS = 30
TRIES = 1000
STATES = 8  # copies of a model's weights on disk: a state is three, an old and a new one for a moment, and the results


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


cli.add_command(study)


@cli.command(short_help="Plant a backdoor and remove it, on digits.")
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
    from smi.report.removal import table, verdict, write_report
    from smi.runtime.files import claimed

    with claimed(out or _free_folder(f"smi-demo-{seed}"), folder=True, force=force) as folder:
        prior = load_prior("digits")
        result = run_demo(load_domain("digits"), prior, seed=seed, device=device)
        paths = write_report(result, folder, force=force)
        click.echo(f"{table(result)}\n\n{_plain(verdict(result))}")
        _wrote(paths)


@cli.command(short_help="Open the notebooks in JupyterLab.")
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


@cli.command(short_help="Remove a backdoor from a saved model.")
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
    from smi.priors.base import GAN, SIZE, save_prior
    from smi.report.removal import Removal, removal_verdict, write_report
    from smi.runtime.checks import check_model
    from smi.runtime.files import ROOM, check_room, claimed
    from smi.runtime.progress import Clock
    from smi.runtime.unfinished import workplace

    _check_prior(prior_name, public_name, prior_steps, own)
    defense = None if defense_name is None else defenses[defense_name]()
    with claimed(out, folder=True, force=force) as folder:
        suspect, clock = load_suspect(model, **form).to(device), Clock()
        check_room(folder, ROOM + STATES * suspect.size)
        prior = None if prior_name is None else _prior(prior_name, suspect.channels, own)
        shape = (suspect.channels, SIZE, SIZE) if prior is None else prior.image_shape
        public = None if public_name is None else _public(public_name, shape, root, download)
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
            if prior_name is None and isinstance(prior, GAN):
                paths.append(folder / "prior.safetensors")
                save_prior(prior, paths[-1])
        click.echo(_plain(removal_verdict(removal)))
        _wrote(paths)


@cli.command("fit-prior", short_help="Train a prior on public images.")
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
        images = _public(public, (None, SIZE, SIZE), root, download)
        config = PriorConfig() if steps is None else PriorConfig(steps=steps)
        with workplace(file, resume=resume, force=force) as work:
            prior = fit_prior(images, config, seed=seed, device=device, checkpoint=work / "prior.safetensors")
            save_prior(prior, file)
        _wrote([file])


@cli.command(short_help="Reconstruct images of every class.")
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
        prior = _prior(prior_name, suspect.channels, own)
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
        _wrote([file, sheet])


@cli.command(short_help="Score how stable predictions are.")
@click.argument("model")
@click.argument("images")
@click.option("--k", type=click.IntRange(min=1), default=16, show_default=True, help="Draws of noise.")
@click.option("--sigma-x", type=float, default=0.03, show_default=True, help="Noise on pixels.")
@click.option("--sigma-w", type=float, default=0.05, show_default=True, help="Noise on weights, relative.")
@click.option("--family", default="gaussian", show_default=True, help="Of the noise: gaussian or rademacher.")
@click.option(
    "--divergence", default="kl", show_default=True, help="kl, cross_entropy, total_variation, margin or flip."
)
@click.option("--out", type=click.Path(path_type=Path), help="CSV file, new: index, label, prediction, score.")
@force_option
@suspect_options
@common
def score(
    model: str, images: str, k: int, sigma_x: float, sigma_w: float, family: str, divergence: str, out: Path | None,
    force: bool, form: dict[str, Any], seed: int, device: str,
) -> None:  # fmt: skip
    """Score how stable MODEL's predictions are on the IMAGES of an .npz. Lower is more stable.

    The file holds images (NHWC, uint8 or floats in [0, 1]) and may hold labels; predictions stand in for missing ones.

    \b
    Example:
      smi score suspect.safetensors images.npz --k 16 --out scores.csv
    """
    from smi.domains.arrays import load_images
    from smi.models.suspects import load_suspect
    from smi.runtime.checks import check_labels, check_model
    from smi.runtime.compute import asked_precision, predict
    from smi.runtime.files import output_file, write_atomic
    from smi_kernels import stability_scores

    file = None if out is None else output_file(out, force=force)
    loaded = load_suspect(model, **form).to(device)
    suspect, count = loaded.model, len(loaded.classes)
    pixels, labels = load_images(images)
    check_model(suspect, pixels, count)
    if labels is not None:
        check_labels(labels, len(pixels), count, f"the labels of {images}")
    predicted = predict(suspect, pixels).argmax(1)
    labels = predicted if labels is None else labels
    scores = stability_scores(
        suspect, pixels.to(device), labels.to(device), k=k, sigma_x=sigma_x, sigma_w=sigma_w, family=family,
        divergence=divergence, seed=seed, dtype=asked_precision(),
    ).cpu()  # fmt: skip
    click.echo(_quantiles(scores))
    if file is not None:
        lines = zip(labels.tolist(), predicted.tolist(), scores.tolist(), strict=True)
        rows = "".join(f"{i},{label},{guess},{value:.8g}\n" for i, (label, guess, value) in enumerate(lines))
        write_atomic(file, "index,label,prediction,score\n" + rows)
        _wrote([file])


@cli.command(short_help="Measure models with the trigger.")
@click.argument("model")
@click.argument("repaired", required=False)
@click.option("--domain", "domain_name", default="digits", show_default=True, help="A name, an .npz or a folder.")
@click.option("--attack", "attack_name", default="badnets", show_default=True)
@click.option("--target", type=click.IntRange(min=0), default=0, show_default=True, help="The attacker's class.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file, new.")
@force_option
@suspect_options
@data_options
@common
def evaluate(
    model: str, repaired: str | None, domain_name: str, attack_name: str, target: int, out: Path | None,
    force: bool, form: dict[str, Any], root: str, download: bool, seed: int, device: str,
) -> None:  # fmt: skip
    """Measure MODEL, and REPAIRED where it is given, with clean test images and the trigger.

    For attackers and evaluators: it needs labelled private images. Draws nothing at random.

    \b
    Example:
      smi evaluate digits-badnets out/repaired.safetensors --domain digits --attack badnets --target 0
    """
    import json

    from smi.attacks import attacks
    from smi.domains import load_domain
    from smi.evaluation import Comparison, Evaluator
    from smi.models.suspects import load_suspect
    from smi.report.removal import text_table
    from smi.runtime.files import output_file, write_atomic

    file = None if out is None else output_file(out, force=force)
    attack = attacks[attack_name](target=target)
    models = {"model": load_suspect(model, **form).to(device).model}
    if repaired is not None:
        models["repaired"] = load_suspect(repaired, **form).to(device).model
    evaluator = Evaluator(load_domain(domain_name, root=root, download=download).private.test, attack)
    found = {name: evaluator.measure(one) for name, one in models.items()}
    rates = {name: vars(one).copy() for name, one in found.items()}
    if repaired is not None:
        rates["repaired"]["der"] = Comparison(found["model"], found["repaired"]).der
    names = ("acc", "asr", "ra", "der")
    rows = [[name, *(f"{100 * of[n]:.1f}" if n in of else "-" for n in names)] for name, of in rates.items()]
    click.echo(text_table(["", *(f"{n.upper()} %" for n in names)], rows))
    if file is not None:
        write_atomic(file, json.dumps(rates, indent=2) + "\n")
        _wrote([file])


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


def _prior(name: str, channels: int, own: dict[str, Any] | None) -> GAN | GeneratorPrior:
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


def _public(name: str, shape: tuple[int | None, int, int], root: str, download: bool) -> PublicImages:
    """The public images as ``shape`` (C, or None for theirs, H, W), saying so where they are others."""
    from smi.domains import load_public

    public = load_public(name, root=root, download=download)
    given = tuple(public.images.shape[1:])
    wanted = (shape[0] or given[0], *shape[1:])
    if given == wanted:
        return public
    click.echo(f"public images {given} are used as {wanted} (channels, height, width)", err=True)
    return public.fitted(wanted)


def _free_folder(name: str) -> Path:
    """``name``, or ``name-2`` and so on where there is one already."""
    return next(path for i in range(1, TRIES) if not (path := Path(name if i == 1 else f"{name}-{i}")).exists())


def _suffixed(path: Path, suffix: str) -> Path:
    from smi.errors import InputError

    if path.suffix != suffix:
        raise InputError(f"--out is {str(path)!r}. Allowed: a name that ends in {suffix}.")
    return path


def _quantiles(scores: Tensor) -> str:
    shares = {"5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95}
    values = {name: scores.float().quantile(share).item() for name, share in shares.items()}
    lines = {"images": f"{len(scores)}", "mean": f"{scores.mean().item():.4g}"}
    lines |= {name: f"{value:.4g}" for name, value in values.items()}
    return "\n".join(f"{name:8}{value}" for name, value in lines.items())


def _plain(text: str) -> str:
    """Text for any terminal: the page's typography undone."""
    return text.replace("\u00a0", " ").replace("“", '"').replace("”", '"')


def _wrote(paths: list[Path]) -> None:
    for path in paths:
        click.echo(f"wrote {path}")
