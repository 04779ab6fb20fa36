"""``smi score`` and ``smi evaluate``: what can be measured, without the trigger and with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from smi.cli.inputs import wrote
from smi.cli.options import common, data_options, force_option, suspect_options

if TYPE_CHECKING:
    from torch import Tensor


@click.command(short_help="Score how stable predictions are.")
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
    from smi.runtime.compute import predict
    from smi.runtime.files import output_file, write_atomic
    from smi.runtime.precision import asked_precision
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
        wrote([file])


@click.command(short_help="Measure models with the trigger.")
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
        wrote([file])


def _quantiles(scores: Tensor) -> str:
    shares = {"5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95}
    values = {name: scores.float().quantile(share).item() for name, share in shares.items()}
    lines = {"images": f"{len(scores)}", "mean": f"{scores.mean().item():.4g}"}
    lines |= {name: f"{value:.4g}" for name, value in values.items()}
    return "\n".join(f"{name:8}{value}" for name, value in lines.items())
