"""What a defense is: a suspect model and samples in, a repaired model out. It never sees private data or a trigger."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from smi.detection import Detection
from smi.domains.base import PublicImages, Samples, check_public, check_samples
from smi.erasure.search import ANYWHERE, Found
from smi.runtime.checks import check_model, check_module
from smi.runtime.compute import fingerprint_of, frozen
from smi.runtime.files import fingerprint
from smi.runtime.job import Job, OnRound, unwatched
from smi.runtime.precision import asked_precision
from smi.runtime.unfinished import EVERY, Unfinished
from smi_kernels import Registry


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a removal saw that looks for triggers (`smi.defenses.Erasure`).

    Attributes:
        detection: The search on the suspect.
        treated: Classes whose triggers were erased or tuned against, or `ANYWHERE` alone; none where nothing stood out.
        after: Triggers of those classes on the repaired model; empty for none.
        left: Treated classes that are still reached unusually easily.
        asked: Whether the caller said which classes to treat.
        unerased: Treated classes of which no direction was erased: their triggers were tuned against alone.
    """

    detection: Detection
    treated: list[int]
    after: list[Found]
    left: list[int]
    asked: bool = False
    unerased: tuple[int, ...] = ()

    def excess_after(self) -> list[float]:
        """The largest excess in any family that each of the treated classes has on the repaired model."""
        scan = self.detection.scan
        if self.treated == [ANYWHERE]:
            return [scan.excess_anywhere(self.after).max().item()]
        return scan.excess(self.after).amax(0).tolist() if self.after else []


@dataclass(frozen=True, eq=False)
class Repair:
    """The outcome of a removal.

    Attributes:
        model: The repaired model, in eval mode.
        defense: Name of the defense, for tables.
        source: Name of the samples' source, for tables.
        settings: What the defense ran with, what it chose itself included.
        log: Curves and findings by name.
        delta: Universal δ's found on the suspect model ``[T, C, H, W]``, where the defense looks for them.
        evidence: Of an `Erasure`, what it saw.
    """

    model: nn.Module
    defense: str
    source: str
    settings: dict[str, Any]
    log: dict[str, Any] = field(default_factory=dict)
    delta: Tensor | None = None
    evidence: Evidence | None = None

    @property
    def findings(self) -> dict[str, Any]:
        """What the defense logged, with its name, for a record."""
        return {"defense": self.defense, **self.log}

    def __repr__(self) -> str:
        return f"Repair(by {self.defense} on {self.source} samples)"


@dataclass(frozen=True, kw_only=True)
class Defense:
    """Base of every defense.

    Attributes:
        name: For tables and records.
        needs_samples: Whether it needs samples; where not, `repair` takes None, too.
        version: Raised by hand when the numbers change that the defense gives: studies then compute its cells again.
    """

    name = "defense"
    version: ClassVar[int] = 1
    needs_samples: ClassVar[bool] = True

    def repair(
        self,
        model: nn.Module,
        samples: Samples | None = None,
        public: PublicImages | None = None,
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        every: float = EVERY,
        on_round: OnRound = unwatched,
    ) -> Repair:
        """Repair a copy of ``model``; the model passed in is left as it is.

        Args:
            model: Images ``[N, C, H, W]`` in [0, 1] to logits.
            samples: Labelled images (`smi.invert` makes them), or None for a defense that needs none.
            public: Unlabelled public images, where the defense uses any: on which triggers are searched, or on which
                the repaired model is held to the suspect's own outputs.
            seed: Of everything random.
            checkpoint: A file for the state of the work. Where it exists, the repair goes on from it, to the same
                weights.
            every: Seconds between two writings of it. It is written before Ctrl-C and SIGTERM end the work, too.
            on_round: Called with the model in training and its round, 0 before the first, and after each, by defenses
                that train in rounds; by one that trains more than once, each time from 0.

        Raises:
            InputError: For anything else, a `PrivateSet` or an attack above all.
        """
        if samples is None and not self.needs_samples:
            check_module(model)
            check_public(public, None)
            return self._done(model, cast(Samples, samples), public, Job(seed=seed))  # which takes None there
        check_samples(samples, f"The defense {self.name!r}")
        samples = cast(Samples, samples)
        check_model(model, samples.images, samples.num_classes)
        check_public(public, samples.images.shape[1:])
        self.check_fits(model, samples.images[:2])
        record = self.settings() | {"seed": seed, "precision": asked_precision()}
        if checkpoint is not None:
            record |= {"model": fingerprint_of(model), "public": None if public is None else fingerprint(public.images)}
            record |= {"images": fingerprint(samples.images), "labels": fingerprint(samples.labels)}
        unfinished = Unfinished(checkpoint, "removal", record, every=every)
        return self._done(model, samples, public, Job(seed=seed, unfinished=unfinished, on_round=on_round))

    def _done(self, model: nn.Module, samples: Samples, public: PublicImages | None, job: Job) -> Repair:
        """The repair; its parameters ask for gradients where the suspect's do."""
        repair = self._repair(frozen(model), samples, public, job)
        asks = {name: weight.requires_grad for name, weight in model.named_parameters()}
        for name, weight in repair.model.named_parameters():
            weight.requires_grad_(asks.get(name, True))
        return repair

    def check_fits(self, model: nn.Module, images: Tensor) -> None:
        """Raise `InputError` where the defense cannot work on ``model``; asked before samples are made, too.

        Args:
            model: The suspect.
            images: One or more ``[N, C, H, W]`` that the model takes.
        """

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, job: Job) -> Repair:
        """What a defense is. ``model`` is `frozen`, a copy that is the repair's own: to be asked, not changed."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The configuration, for the record."""
        return {"defense": self.name} | asdict(self)


defenses: Registry[type[Defense]] = Registry("defense")
