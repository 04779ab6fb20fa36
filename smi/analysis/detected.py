"""How well `smi.detect` tells a study's victims from clean models, by reconstructions: one row a model.

Clean models are the classifiers of the same data and architecture that a study trains for its attacks and its judges.
What is found is kept beside the cells, in ``NAME.detections.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import nn

from smi.analysis.study import JUDGE_SEED, clean_judge
from smi.detection import Detection, Detector, detect
from smi.domains import Domain, load_domain
from smi.erasure import ANYWHERE
from smi.priors.base import load_prior
from smi.runtime.progress import track
from smi.sources import SourceInputs, make_samples
from smi.study.records import Measured, tidy
from smi.study.results import Row
from smi.study.spec import Cell, Study, digest
from smi.study.stages import Store, clean_classifier, kept_if_whole, load_victim, make_prior

NONE = "none"  # the attack on a clean model
CONFIG = Detector()

DETECTION_COLUMNS = (
    "domain", "attack", "seed", "asr", "excess_target", "excess_most", "most", "flagged"
)  # fmt: skip
"""Columns of `detections`.

Columns:
    attack: "none" for a clean model.
    asr: Attack success of the victim.
    excess_target: The largest excess in any family (`Scan.excess`) of the attacker's class (of the largest, where every
        class is a target).
    excess_most: The same of the class where it is largest.
    most: That class; -1 stands for "anywhere".
    flagged: "target" where the attacker's class is a sign, "other" where only others are, "no" where none is.
"""


@dataclass(frozen=True)
class _Model:
    """One model of a study.

    Attributes:
        cell: One of the victim's, or one of the clean model's scenario.
        seed: That it was trained with.
        clean: "" for the cell's victim, else which clean model.
    """

    cell: Cell
    seed: int
    clean: str = ""

    @property
    def key(self) -> str:
        """Names it: the same for the same model, samples and search."""
        which = {"place": self.cell.scenario.identity, "clean": self.clean}
        what: dict[str, Any] = which if self.clean else {"victim": self.cell.victim_key}
        per_class = self.cell.per_class
        return digest(what | {"seed": self.seed, "per_class": per_class, "detector": asdict(CONFIG)})


def detections(study: Study, store: Store) -> tuple[list[Row], int]:
    """Rows of `DETECTION_COLUMNS`, and how many victims of the study are neither in the cache nor measured."""
    models, kept = list(_models(study)), Measured(store.found(study, "detections"), DETECTION_COLUMNS)
    ready = [model for model in models if model.clean or model.key in kept or _whole(model, store)]
    rows = [
        kept.row(model.key, partial(_measure, model, store)) for model in track(ready, f"detection of {study.name}")
    ]
    tidy(kept.file)
    return rows, len(models) - len(ready)


def _models(study: Study) -> Iterator[_Model]:
    """Each model once."""
    seen: set[object] = set()
    for cell in study.cells:
        if cell.victim_key not in seen:
            seen.add(cell.victim_key)
            yield _Model(cell, cell.seed)
        if (cell.scenario, cell.seed) not in seen:
            seen.add((cell.scenario, cell.seed))
            yield _Model(cell, cell.seed, "surrogate")
            yield _Model(cell, JUDGE_SEED + cell.seed, "judge")


def _whole(model: _Model, store: Store) -> bool:
    return kept_if_whole(store.kept("victims", model.cell.victim_key), "victim")


def _measure(model: _Model, store: Store) -> Row:
    cell, domain = model.cell, load_domain(model.cell.scenario.domain, public=model.cell.scenario.public)
    net, targets, asr = _loaded(model, store, domain)
    prior = load_prior(make_prior(cell.scenario, store))
    given = SourceInputs(model=net, prior=prior, public=domain.public, per_class=cell.per_class, seed=cell.seed)
    found = detect(net, make_samples("smi", given), domain.public, CONFIG, seed=cell.seed)
    row: Row = {"domain": cell.scenario.domain, "attack": NONE if model.clean else cell.attack_name, "seed": model.seed}
    return row | {"asr": asr} | _excess(found, targets)


def _loaded(model: _Model, store: Store, domain: Domain) -> tuple[nn.Module, list[int], float | None]:
    """The model, the attacker's classes and the attack's success; none and None for a clean one."""
    cell = model.cell
    if model.clean:
        make = clean_classifier if model.clean == "surrogate" else clean_judge
        return make(cell, store, domain), [], None
    net, attack, before = load_victim(str(store.kept("victims", cell.victim_key)), cell.attack)
    return net, attack.relabel(domain.private.train.labels, domain.num_classes).unique().tolist(), before.asr


def _excess(found: Detection, targets: list[int]) -> Row:
    scan = found.scan
    excess = dict(zip(scan.classes, scan.excess().amax(0).tolist(), strict=True))
    excess[ANYWHERE] = scan.excess_anywhere().max().item()
    most = max(excess, key=excess.__getitem__)
    wanted = {*targets, ANYWHERE} if len(targets) == len(scan.classes) else set(targets)
    return {
        "excess_target": max((excess[label] for label in wanted), default=None),
        "excess_most": excess[most],
        "most": most,
        "flagged": "target" if wanted & set(found.reached) else "other" if found.reached else "no",
    }
