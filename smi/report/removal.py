"""What a run found, for people: an HTML page, a JSON record, a table for the terminal, and the repaired weights.

A page is put together from sections. Those that need only what a defender has serve the demo (`Demo`) and a user's
own model (`Removal`) alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from smi.demo import Demo
from smi.detection import Detection
from smi.domains.base import Samples
from smi.inversion.selection import kernel_backend, score_samples
from smi.models.store import save_classifier
from smi.models.suspects import Suspect
from smi.pipeline import Cleaned
from smi.report.page import page, paragraph
from smi.report.sections import (
    RATES,
    curves_section,
    defender_section,
    detection_section,
    pattern_section,
    reconstructions_section,
    record_section,
    result_rows,
    results_section,
    time_section,
    trigger_section,
    triggers_section,
)
from smi.report.verdicts import removal_verdict, verdict
from smi.runtime.compute import circumstances, predict
from smi.runtime.files import output_folder, write_atomic
from smi.runtime.threads import threads_of


@dataclass(frozen=True, eq=False)
class Removal:
    """A removal from a user's own model, and what can be measured about it without clean data or the trigger.

    Attributes:
        suspect: The model before, and the layout to save the repaired one in.
        cleaned: The repaired model, the reconstructions and the details.
        seed: Of the run.
        stages: Seconds by stage.
        settings: For the record.
        detection: Whether the suspect shows a backdoor, where that was looked into beside the removal.
        held_out: Reconstructions that the removal did not use, to compare the models on; without any the removal's own
            serve.
    """

    suspect: Suspect
    cleaned: Cleaned
    seed: int
    stages: dict[str, float]
    settings: dict[str, Any]
    detection: Detection | None = None
    held_out: Samples | None = None

    @property
    def found(self) -> Detection | None:
        """Whether the suspect shows a backdoor: what the removal saw, or what was looked into beside it."""
        evidence = self.cleaned.repair.evidence
        return self.detection if evidence is None else evidence.detection

    @property
    def judged(self) -> Samples:
        """The reconstructions that the models are compared on."""
        return self.cleaned.samples if self.held_out is None else self.held_out

    @cached_property
    def agreement(self) -> Tensor:
        """Whether both models give the same label, bool ``[N]``, on each of the images `judged`."""
        images = self.judged.images
        return predict(self.suspect.model, images).argmax(1) == predict(self.cleaned.model, images).argmax(1)

    @cached_property
    def stability(self) -> tuple[Tensor, Tensor]:
        """Stability scores ``[N]`` of the images `judged` on the suspect and on the repaired model, same noise."""
        models = (self.suspect.model, self.cleaned.model)
        before, after = (score_samples(model, self.judged, seed=self.seed) for model in models)
        return before, after

    def summary(self) -> dict[str, Any]:
        """The record that `report.json` holds: rates in [0, 1], times in seconds."""
        before, after = (scores.median().item() for scores in self.stability)
        samples = self.cleaned.samples
        return {
            "seed": self.seed,
            "n": len(samples),
            "held_out": 0 if self.held_out is None else len(self.held_out),
            "classes": list(self.suspect.classes),
            "agreement": self.agreement.float().mean().item(),
            "stability": {"median_before": before, "median_after": after},
            "findings": self.cleaned.repair.findings,
            "detection": None if self.found is None else self.found.record(),
            "verdict": removal_verdict(self),
            "stages": self.stages,
            "settings": self.settings,
            "kernel_backend": kernel_backend(self.suspect.model, samples.images, samples.labels),
        } | circumstances(self.suspect.model)


def write_report(run: Demo | Removal, folder: str | Path, *, force: bool = False) -> list[Path]:
    """Write ``report.html``, ``report.json`` and the repaired weights; returns their paths.

    The weights go to ``repaired.safetensors``, a user's own model in the layout that it came in. Everything is composed
    before the first file is written. The weights come first: a layout may be unable to hold them (float16, say).

    Args:
        run: What was found.
        folder: New or empty.
        force: Files of these names are replaced where it is not empty.

    Raises:
        InputError: For another folder.
    """
    html = demo_page(run) if isinstance(run, Demo) else removal_page(run)
    content = json.dumps(_finite(run.summary()), indent=2, default=str, allow_nan=False) + "\n"
    target = output_folder(folder, force=force)
    target.mkdir(parents=True, exist_ok=True)
    suffix = ".safetensors" if isinstance(run, Demo) else run.suspect.suffix
    paths = [target / name for name in ("report.html", "report.json", f"repaired{suffix}")]
    record = {"seed": run.seed, "settings": json.loads(content)["settings"]}
    if isinstance(run, Demo):
        record |= {"classes": list(run.domain.classes)}
        save_classifier(run.row("smi").repair.model, paths[2], arch=run.settings["train"]["arch"], record=record)
    else:
        run.suspect.write(run.cleaned.model, paths[2], record | {"classes": list(run.suspect.classes)})
    write_atomic(paths[0], html)
    write_atomic(paths[1], content)
    return paths


def demo_page(demo: Demo) -> str:
    """The demo's report as HTML."""
    smi, classes = demo.row("smi"), demo.domain.classes
    evidence = smi.repair.evidence
    runs = {row.source: row.repair for row in demo.rows}
    return page(
        f"Backdoor removal without clean data: {demo.domain.name}, seed {demo.seed}",
        paragraph(verdict(demo), "verdict"),
        results_section(demo),
        trigger_section(demo),
        *([] if evidence is None else [detection_section(evidence.detection, classes, evidence)]),
        triggers_section(demo.victim, smi.repair, demo.samples, classes),
        reconstructions_section(demo.samples, classes),
        pattern_section(smi.repair),
        curves_section(runs),
        time_section(demo.stages, threads_of(demo.victim)),
        record_section(demo.settings, circumstances(demo.victim)),
    )


def removal_page(removal: Removal) -> str:
    """The report on a user's own model as HTML."""
    cleaned, classes, detection = removal.cleaned, removal.suspect.classes, removal.found
    return page(
        f"Backdoor removal without clean data, seed {removal.seed}",
        paragraph(removal_verdict(removal), "verdict"),
        *([] if detection is None else [detection_section(detection, classes, cleaned.repair.evidence)]),
        triggers_section(removal.suspect.model, cleaned.repair, cleaned.samples, classes),
        defender_section(removal.agreement, removal.stability, removal.judged, classes),
        reconstructions_section(cleaned.samples, classes),
        pattern_section(cleaned.repair),
        curves_section({cleaned.samples.source: cleaned.repair}),
        time_section(removal.stages, threads_of(removal.suspect.model), resumed=bool(removal.settings.get("resumed"))),
        record_section(removal.settings, circumstances(removal.suspect.model)),
    )


def table(demo: Demo) -> str:
    """The demo's table for the terminal."""
    rows = [[label, removal, *rates] for label, removal, rates in result_rows(demo)]
    return text_table(["samples", "removal", *(f"{name} %" for name in RATES)], rows, left=2)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table for the terminal: the first ``left`` columns flush left, the others right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in [head, *rows]
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def _finite(value: Any) -> Any:
    """The record without NaN and infinities, which JSON does not have: None instead."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
