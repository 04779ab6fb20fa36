"""Removals on victims that no setting was chosen on: a row a cell, added to a CSV as they are done.

    python -m smi.analysis.removal_check digits small_cnn 30 --csv notebooks/results/removal_check.csv

Trains the victims of one domain, architecture and seed, makes samples from each source, and repairs by the default
removal, which is not told the target. Beside the attack's success stands its floor: how often a model that was never
attacked calls the stamped images the target.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
from torch import nn

from smi.attacks import BadNetsAllToAll, attacks, plant
from smi.attacks.base import Attack
from smi.defenses import Erasure
from smi.domains import Domain, load_domain
from smi.erasure import ANYWHERE
from smi.evaluation import Comparison, Evaluator
from smi.models.classifiers import TrainConfig, train_classifier
from smi.priors.base import load_prior
from smi.runtime.compute import predict
from smi.runtime.files import write_atomic
from smi.runtime.progress import track
from smi.runtime.seeding import derive
from smi.sources import SourceInputs, make_samples

SOURCES = ("clean", "smi", "latent", "public")
NONE = "none"  # the attack on a clean model
COLUMNS = (
    "domain", "architecture", "attack", "seed", "target", "source", "acc_before", "asr_before", "floor", "acc_after",
    "asr_after", "der", "signs", "found", "rounds", "left",
)  # fmt: skip
"""Columns of `check`, rates in percent.

Columns:
    target: The attacker's class, "all" for all-to-all, "" for a clean model.
    signs: Classes that the report calls unusual, "anywhere" for the search to any class.
    found: Classes that were treated.
    rounds: Of tuning.
    left: Of those found, what the report still calls unusual.
"""

Row = dict[str, str | int | float]


def check(
    domain: Domain,
    config: TrainConfig,
    prior: str,
    names: Sequence[str],
    seed: int,
    done: Sequence[Row],
    chosen: Sequence[str] = SOURCES,
    per_class: int = 30,
) -> Iterator[Row]:
    """Rows of `COLUMNS` that are not done yet, one after the other.

    Args:
        domain: Where the victims come from, and the public images.
        config: How they are trained.
        prior: Name or file of the prior.
        names: Attacks, and "none" for no attack.
        seed: Of everything.
        done: Rows that need not be made again.
        chosen: Sources of samples.
        per_class: Samples a class.
    """
    have = {(row["domain"], row["architecture"], row["attack"], int(row["seed"]), row["source"]) for row in done}
    clean: nn.Module | None = None
    for name in track(names, f"{domain.name}, {config.arch}, seed {seed}", unit="attacks"):
        wanted = [s for s in chosen if (domain.name, config.arch, name, seed, s) not in have]
        if not wanted:
            continue
        if clean is None:
            clean = train_classifier(domain.private.train, config, seed=derive(seed, "clean") % 2**31)
        victim, attack = _victim(domain, config, name, seed, clean)
        evaluator = None if attack is None else Evaluator(domain.private.test, attack)
        detection = None  # is of the model and the public images: the same whatever the samples
        for source in wanted:
            given = SourceInputs(
                model=victim, prior=load_prior(prior), public=domain.public, seed=seed, per_class=per_class,
                private=domain.private.train,
            )  # fmt: skip
            removal = Erasure(detection=detection)
            repair = removal.repair(victim, make_samples(source, given), domain.public, seed=seed)
            assert repair.evidence is not None
            detection = repair.evidence.detection
            row: Row = {"domain": domain.name, "architecture": config.arch, "attack": name, "seed": seed}
            row |= {"target": _target(attack), "source": source}
            row |= _rates(domain, victim, repair.model, clean, evaluator)
            row |= {"signs": _classes(detection.reached), "found": _classes(repair.evidence.treated)}
            row |= {"rounds": repair.log["rounds"]}
            row |= {"left": _classes(repair.evidence.left)}
            yield row


def _victim(
    domain: Domain, config: TrainConfig, name: str, seed: int, clean: nn.Module
) -> tuple[nn.Module, Attack | None]:
    """The model, and the attack with a target that differs from attack to attack."""
    if name == NONE:
        return clean, None
    target = derive(seed, f"target/{name}") % domain.num_classes
    return plant(domain.private.train, replace(attacks[name](), target=target), config, seed=seed)


def _rates(
    domain: Domain, victim: nn.Module, repaired: nn.Module, clean: nn.Module, evaluator: Evaluator | None
) -> Row:
    if evaluator is None:
        test = domain.private.test
        row: Row = {"asr_before": "", "floor": "", "asr_after": "", "der": ""}
        for when, model in (("before", victim), ("after", repaired)):
            right = predict(model, test.images).argmax(1) == test.labels
            row[f"acc_{when}"] = 100 * right.float().mean().item()
        return row
    both = Comparison(evaluator.measure(victim), evaluator.measure(repaired))
    return {
        "acc_before": 100 * both.before.acc,
        "asr_before": 100 * both.before.asr,
        "floor": 100 * evaluator.measure(clean).asr,
        "acc_after": 100 * both.after.acc,
        "asr_after": 100 * both.after.asr,
        "der": 100 * both.der,
    }


def _target(attack: Attack | None) -> str:
    if attack is None:
        return ""
    return "all" if isinstance(attack, BadNetsAllToAll) else str(attack.target)


def _classes(labels: Sequence[int]) -> str:
    return " ".join("anywhere" if label == ANYWHERE else str(label) for label in labels)


def rows_of(file: Path) -> list[Row]:
    """The rows of a CSV; none where there is no file."""
    return [dict(row) for row in csv.DictReader(io.StringIO(file.read_text()))] if file.exists() else []


@click.command(help=__doc__)
@click.argument("domain_name")
@click.argument("arch")
@click.argument("seed", type=int)
@click.option("--attack", "names", multiple=True, help="One or more; default: all, and a clean model.")
@click.option("--source", "chosen", multiple=True, help="One or more; default: all.")
@click.option("--public", help="Public images of a domain that has none.")
@click.option("--prior", default="digits", show_default=True)
@click.option("--per-class", type=click.IntRange(1), default=30, show_default=True)
@click.option("--epochs", type=int, default=12, show_default=True)
@click.option("--augment", default="affine", show_default=True)
@click.option("--csv", "file", type=click.Path(path_type=Path), required=True)
def main(
    domain_name: str, arch: str, seed: int, names: tuple[str, ...], chosen: tuple[str, ...], public: str | None,
    prior: str, per_class: int, epochs: int, augment: str, file: Path,
) -> None:  # fmt: skip
    """Add the rows that FILE lacks."""
    domain = load_domain(domain_name, public=public)
    config = TrainConfig(arch=arch, epochs=epochs, augment=augment)
    wanted, sources = names or (*attacks, NONE), chosen or SOURCES
    for row in check(domain, config, prior, wanted, seed, rows_of(file), sources, per_class):
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows([*rows_of(file), {k: f"{v:.2f}" if isinstance(v, float) else v for k, v in row.items()}])
        write_atomic(file, text.getvalue())


if __name__ == "__main__":
    main()
