"""The pieces of a study, each computed once and kept as a file: prior, victim, samples, cell.

Files are written whole or not at all, so that a process that is killed loses what it was computing and nothing else.
"""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from torch import nn

from smi.attacks import Attack, plant
from smi.domains import Domain, Samples, load_domain
from smi.errors import InputError
from smi.evaluation import Comparison, Evaluator, Measurement
from smi.models.classifiers import Classifier, build_classifier, train_classifier
from smi.priors.base import GAN, load_prior, save_prior
from smi.priors.gan import PriorConfig, fit_prior
from smi.runtime.compute import circumstances
from smi.runtime.files import fingerprint, load_tensors, save_tensors
from smi.runtime.precision import precision
from smi.sources import SourceInputs, make_samples
from smi.study.records import Record, once
from smi.study.spec import AUTO, NO_SAMPLES, Cell, Scenario, Study, digest

PRIOR_SEED = 0  # one prior for all cells of a scenario


@dataclass(frozen=True)
class Store:
    """Where files lie, and where models run.

    Attributes:
        results: Of what is found: ``NAME.jsonl`` with a line a cell of the study NAME, ``NAME.analyses.jsonl`` and
            ``NAME.detections.jsonl`` with what `smi study analyse` and `smi study detect` measured.
        cache: Victims, priors and samples, which can be made again.
        device: Of every worker, as torch names it.
    """

    results: Path
    cache: Path
    device: str = "cpu"

    def found(self, study: Study, kind: str = "") -> Path:
        """The file of a study's cells, or of its "analyses" or "detections"."""
        return self.results / f"{study.name}{'.' if kind else ''}{kind}.jsonl"

    @property
    def running(self) -> Path:
        """The folder of cells that are finished and have no line yet."""
        return self.results / "running"

    def kept(self, kind: str, key: str) -> Path:
        """A file of the cache."""
        folder = self.cache / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{key}.safetensors"


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/smi``, or ``~/.cache/smi``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "smi"


def kept_if_whole(file: Path, kind: str) -> bool:
    """Whether a file of the cache is there and whole. One that is damaged is removed, so that it is made again."""
    try:
        load_tensors(file, kind)
    except InputError:
        if file.exists():
            warnings.warn(f"{file} is damaged: it is removed, and made again.", stacklevel=2)
            file.unlink()
        return False
    return True


@lru_cache(maxsize=2)
def _domain(domain: str, public: str | None) -> Domain:
    return load_domain(domain, public=public)


def make_prior(scenario: Scenario, store: Store) -> str:
    """Train the scenario's prior, if it is to be trained and is not there. Returns its name or file."""
    if scenario.prior != "fit":
        return scenario.prior
    images, config = _domain(scenario.domain, scenario.public).public, PriorConfig()
    made_from = {"public": fingerprint(images.images), "config": asdict(config), "seed": PRIOR_SEED} | _asked(scenario)
    file = store.kept("priors", digest(made_from))  # scenarios with the same public images share it
    if not kept_if_whole(file, "prior"):
        checkpoint = file.with_suffix(".checkpoint")
        kept_if_whole(checkpoint, "unfinished prior")  # training goes on from it where it is whole
        with precision(scenario.precision):
            prior = fit_prior(images, config, seed=PRIOR_SEED, device=store.device, checkpoint=checkpoint)
        save_prior(prior, file)
    return str(file)


def _asked(scenario: Scenario) -> dict[str, str]:
    """What a precision that was asked for adds to what a file is made from."""
    return {} if scenario.precision == AUTO else {"precision": scenario.precision}


def make_victim(cell: Cell, store: Store) -> str:
    """Train the victim of a cell and measure it, if it is not there. Returns its file."""
    file = store.kept("victims", cell.victim_key)
    if kept_if_whole(file, "victim"):
        return str(file)
    start, domain = time.perf_counter(), _domain(cell.scenario.domain, cell.scenario.public)
    surrogate = clean_classifier(cell, store, domain) if cell.attack.needs_surrogate else None
    with precision(cell.scenario.precision):
        model, attack = plant(
            domain.private.train, cell.attack, cell.scenario.train, surrogate=surrogate, seed=cell.seed,
            device=store.device,
        )  # fmt: skip
        before = Evaluator(domain.private.test, attack).measure(model)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"attack.{name}": value for name, value in (attack.fitted or {}).items()}
    meta = {
        "kind": "victim", "arch": cell.scenario.train.arch, "channels": domain.private.train.images.shape[1],
        "num_classes": domain.num_classes, "before": asdict(before), "fitted": attack.fitted is not None,
        "seconds": round(time.perf_counter() - start, 3),
    }  # fmt: skip
    save_tensors(file, tensors, meta)
    return str(file)


def clean_classifier(cell: Cell, store: Store, domain: Domain) -> nn.Module:
    """A classifier trained on the clean images, for attacks that are optimised against one; kept like a victim."""
    train = cell.scenario.train
    made_from = {
        "domain": cell.scenario.domain,
        "public": cell.scenario.public,
        "train": asdict(train),
        "seed": cell.seed,
    }
    made_from |= _asked(cell.scenario)
    file = store.kept("surrogates", digest(made_from))
    data = domain.private.train
    if not kept_if_whole(file, "surrogate"):
        with precision(cell.scenario.precision):
            made = train_classifier(data, train, seed=cell.seed, device=store.device)
        save_tensors(file, made.state_dict(), {"kind": "surrogate"})
    model = build_classifier(train.arch, data.images.shape[1], data.num_classes)
    model.load_state_dict(load_tensors(file, "surrogate")[0])
    return model.to(store.device).eval()


def load_victim(file: str, attack: Attack) -> tuple[Classifier, Attack, Measurement]:
    """What `make_victim` wrote: the model, the attack with what it optimised, and the evaluator's measurement."""
    tensors, meta = load_tensors(file, "victim")
    model = build_classifier(meta["arch"], meta["channels"], meta["num_classes"])
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    if meta["fitted"]:
        own = {n.removeprefix("attack."): t for n, t in tensors.items() if n.startswith("attack.")}
        attack = replace(attack, fitted=own)
    return model.eval(), attack, Measurement(**meta["before"])


def make_cell_samples(cell: Cell, store: Store, victim: str, prior: str | None) -> str:
    """Make the samples of a cell, if they are not there. Returns their file; nothing for a defense without samples."""
    if cell.source == NO_SAMPLES:
        return ""
    file = store.kept("samples", cell.samples_key)
    if kept_if_whole(file, "samples"):
        return str(file)
    start, domain = time.perf_counter(), _domain(cell.scenario.domain, cell.scenario.public)
    model, _, _ = load_victim(victim, cell.attack)
    given = SourceInputs(
        model=model.to(store.device), prior=None if prior is None else _prior(prior), public=domain.public,
        per_class=cell.per_class, seed=cell.seed,
        private=domain.private.train if cell.source == "clean" else None,
    )  # fmt: skip
    with precision(cell.scenario.precision):
        samples = make_samples(cell.source, given)
    meta = {"kind": "samples", "num_classes": samples.num_classes, "seconds": round(time.perf_counter() - start, 3)}
    save_tensors(file, {"images": samples.images, "labels": samples.labels}, meta)
    return str(file)


@lru_cache(maxsize=2)
def _prior(name: str) -> GAN:
    return load_prior(name)


def run_cell(cell: Cell, store: Store, victim: str, samples: str) -> Record:
    """Repair and measure. Returns the cell's record, which is in the folder of what is running, too."""
    return once(store.running, cell.key, lambda: names_of(cell) | _measured(cell, store, victim, samples))


def names_of(cell: Cell) -> Record:
    """What the record of a cell says of it, whether it fails or not."""
    return {"key": cell.key, "samples_key": cell.samples_key, "config": cell.config}


def _measured(cell: Cell, store: Store, victim: str, samples: str) -> Record:
    domain = _domain(cell.scenario.domain, cell.scenario.public)
    model, attack, before = load_victim(victim, cell.attack)
    given, made = None, 0.0
    if samples:
        tensors, meta = load_tensors(samples, "samples")
        given, made = Samples(tensors["images"], tensors["labels"], meta["num_classes"], cell.source), meta["seconds"]
    start = time.perf_counter()
    with precision(cell.scenario.precision):
        repair = cell.defense.repair(model.to(store.device), given, domain.public, seed=cell.seed)
        spent = time.perf_counter() - start
        after = Evaluator(domain.private.test, attack).measure(repair.model)
        how = circumstances(repair.model)
    return {
        "n": 0 if given is None else len(given),
        "before": asdict(before),
        "after": Comparison(before, after).as_dict(),
        "seconds": {"samples": made, "repair": round(spent, 3)},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    } | how
