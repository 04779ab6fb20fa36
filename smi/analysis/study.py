"""What the samples of a study are like, beside what removal with them achieved: one row a sample set and defense.

Everything here is the evaluator's: the judge and the detectors are trained on private data, and nothing goes back to a
defense. What is measured is kept beside the study's cells, in ``NAME.analyses.jsonl``: an analysis may be interrupted
and run again, also after the cache with the samples is gone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smi.analysis.presence import Detector, patch_residual, train_detector, trigger_presence
from smi.analysis.similarity import similarity
from smi.attacks import Attack
from smi.domains import Domain, Samples, load_domain
from smi.errors import InputError
from smi.inversion.selection import Selection, score_samples
from smi.models.classifiers import build_classifier, train_classifier
from smi.runtime.files import load_tensors, save_tensors
from smi.runtime.progress import track
from smi.study.records import Measured, tidy
from smi.study.results import COLUMNS, Row, known, outcome, read_rows, stored
from smi.study.spec import NO_SAMPLES, Cell, Study, digest
from smi.study.stages import Store, kept_if_whole, load_victim

JUDGE_SEED = 1000  # is added to the victim's, which stay below it: judge and victim never start from the same weights
DEFENSE = "erasure"  # a sample set counts once this removal with it is done

MEASURED = (
    "frechet", "nearest", "judge_accuracy",
    "score_joint", "score_input", "score_parameter",
    "presence", "presence_target", "presence_if_stamped", "detector_hits", "detector_false_alarms", "residual_target",
)  # fmt: skip
"""Columns that depend on the samples alone.

Columns:
    frechet, nearest, judge_accuracy: See `Similarity`, against the private test set.
    score_*: Medians of the stability score on the victim.
    presence: Share of the samples that the detector takes for stamped.
    presence_target: Of those of the target class (of all, where every class is a target).
    presence_if_stamped: Of all once they are stamped, which says whether the detector sees on such images at all.
    detector_*: Its rates on the private test set.
    residual_target: Median `patch_residual` of the target class, empty for triggers that replace no pixels.
"""

ANALYSIS_COLUMNS = (*COLUMNS, *MEASURED)


@dataclass(frozen=True)
class SampleSets:
    """What can be analysed: the finished cells of each sample set, and how many sets of the study are not ready."""

    ready: tuple[tuple[Cell, ...], ...]
    missing: int


def sample_sets(study: Study, store: Store) -> SampleSets:
    """The sample sets that were measured or lie in the cache with their victim, and have a finished `DEFENSE` cell."""
    cells: dict[str, list[Cell]] = defaultdict(list)
    for cell in study.cells:
        if cell.source != NO_SAMPLES:
            cells[cell.samples_key].append(cell)
    records, measured = known(study, store), _measured(store.found(study))
    ready = []
    for key, members in cells.items():
        done = tuple(cell for cell in members if outcome(cell, records) == "done")
        kept = _samples(members[0], store).exists() and _victim(members[0], store).exists()
        if (kept or key in measured) and any(cell.defense_name == DEFENSE for cell in done):
            ready.append(done)
    return SampleSets(tuple(ready), len(cells) - len(ready))


def analyse(study: Study, store: Store) -> list[Row]:
    """`ANALYSIS_COLUMNS` of each finished cell of the sets that are ready (`sample_sets` says how many are not)."""
    kept, rows = _measured(store.found(study)), []
    for cells in track(sample_sets(study, store).ready, f"analysis of {study.name}"):
        measured = kept.row(cells[0].samples_key, partial(_measure, cells[0], store))
        rows += [row | measured for row in read_rows(Study(study.name, cells), store)]
    tidy(kept.file)
    return rows


def stored_analysis(file: Path) -> list[Row]:
    """`ANALYSIS_COLUMNS` of the cells in ``file``, of any study (`stored`), whose samples have been measured."""
    kept = _measured(file)
    found = [(record["samples_key"], row) for record, row in stored(file)]
    return [row | kept.row(key, dict) for key, row in found if key in kept]


def _measured(cells: Path) -> Measured:
    """What was measured of the samples of the study whose cells are in this file."""
    return Measured(cells.with_suffix(".analyses.jsonl"), MEASURED)


def _measure(cell: Cell, store: Store) -> Row:
    model, attack, _ = load_victim(str(_victim(cell, store)), cell.attack)
    tensors, meta = load_tensors(_samples(cell, store), "samples")
    samples = Samples(tensors["images"], tensors["labels"], meta["num_classes"], cell.source)
    domain = _domain(cell.scenario.domain, cell.scenario.public)
    alike = similarity(clean_judge(cell, store, domain), samples, domain.private.test)
    values: Row = {"domain": cell.scenario.domain, "attack": cell.attack_name, "source": cell.source, "seed": cell.seed}
    values |= {"frechet": alike.frechet, "nearest": alike.nearest, "judge_accuracy": alike.accuracy}
    values |= _scores(model, samples, cell.seed)
    return values | _presence(_detector(cell, store, domain, attack), attack, samples, domain)


def _scores(model: nn.Module, samples: Samples, seed: int) -> Row:
    joint = Selection()
    kinds = {"joint": joint, "input": replace(joint, sigma_w=0.0), "parameter": replace(joint, sigma_x=0.0)}
    return {
        f"score_{name}": score_samples(model, samples, selection, seed=seed).median().item()
        for name, selection in kinds.items()
    }


def _presence(detector: Detector, attack: Attack, samples: Samples, domain: Domain) -> Row:
    wanted = attack.relabel(domain.private.train.labels, samples.num_classes).unique()
    target = samples.images[torch.isin(samples.labels, wanted)]
    return {
        "presence": trigger_presence(detector, samples.images),
        "presence_target": trigger_presence(detector, target) if len(target) else None,
        "presence_if_stamped": trigger_presence(detector, attack.stamp(samples.images)),
        "detector_hits": detector.hits,
        "detector_false_alarms": detector.false_alarms,
        "residual_target": _residual(target, attack, domain.private.test.images),
    }


def _residual(images: Tensor, attack: Attack, clean: Tensor) -> float | None:
    try:
        return patch_residual(images, attack, clean).median().item() if len(images) else None
    except InputError:  # a trigger that replaces no pixels
        return None


def clean_judge(cell: Cell, store: Store, domain: Domain) -> nn.Module:
    """A classifier trained on the clean private images with a seed of its own."""
    train, data, seed = cell.scenario.train, domain.private.train, JUDGE_SEED + cell.seed
    key = digest({"domain": cell.scenario.domain, "public": cell.scenario.public, "train": asdict(train), "seed": seed})
    return _kept_model(
        cell, store, "judge", key, data.num_classes, lambda: (train_classifier(data, train, seed=seed), {})
    )[0]


def _detector(cell: Cell, store: Store, domain: Domain, attack: Attack) -> Detector:
    """The detector of a victim's trigger."""

    def make() -> tuple[nn.Module, dict[str, Any]]:
        seed = JUDGE_SEED + cell.seed
        made = train_detector(domain.private.train, domain.private.test, attack, cell.scenario.train, seed=seed)
        return made.model, {"hits": made.hits, "false_alarms": made.false_alarms}

    model, rates = _kept_model(cell, store, "detector", cell.victim_key, 2, make)
    return Detector(model, rates["hits"], rates["false_alarms"])


def _kept_model(
    cell: Cell, store: Store, kind: str, key: str, outputs: int, make: Callable[[], tuple[nn.Module, dict[str, Any]]]
) -> tuple[nn.Module, dict[str, Any]]:
    """A classifier of the cell's architecture and what is known of it: made once and kept, like a victim."""
    file = store.kept(f"{kind}s", key)
    if not kept_if_whole(file, kind):
        model, known = make()
        save_tensors(file, model.state_dict(), {"kind": kind, "known": known})
    tensors, meta = load_tensors(file, kind)
    channels = _domain(cell.scenario.domain, cell.scenario.public).private.train.images.shape[1]
    kept = build_classifier(cell.scenario.train.arch, channels, outputs)
    kept.load_state_dict(tensors)
    return kept.eval(), meta["known"]


@lru_cache(maxsize=2)
def _domain(domain: str, public: str | None) -> Domain:
    return load_domain(domain, public=public)  # the public side may take classes from the private one


def _samples(cell: Cell, store: Store) -> Path:
    return store.kept("samples", cell.samples_key)


def _victim(cell: Cell, store: Store) -> Path:
    return store.kept("victims", cell.victim_key)
