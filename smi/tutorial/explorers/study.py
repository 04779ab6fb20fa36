"""What a study found: one number of a removal by source of its samples, mean and worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets as W
from matplotlib.figure import Figure

from smi.errors import InputError
from smi.plotting.pictures import BLUE, VERMILLION
from smi.study.results import Row, summarise
from smi.tutorial.explorers.base import Explorer

ALL = "all attacks"
ALL_SEEDS = "all seeds"
RATES = {
    "ACC, accuracy (keep)": ("acc", max),
    "ASR, attack success (remove)": ("asr", min),
    "DER, both in one": ("der", max),
}


@dataclass(frozen=True, eq=False)
class Bars:
    """Mean and worst of one rate in percent by source, best first.

    Attributes:
        shown: The rate.
        mean: By source.
        worst: By source.
        cells: Removals by source.
    """

    shown: str
    mean: dict[str, float]
    worst: dict[str, float]
    cells: dict[str, int]


class StudyExplorer(Explorer):
    """The rows of a study by source of the samples.

    Args:
        rows: As `smi.study.results.from_csv` reads them.
        names: What sources are called; default their short names.
        highlight: The source in the other colour.
    """

    def __init__(self, rows: Sequence[Row], names: Mapping[str, str] | None = None, *, highlight: str = "smi") -> None:
        if not rows:
            raise InputError("The study has no rows: there is nothing to show. Run some of its cells first.")
        self.rows, self.names, self.highlight = list(rows), dict(names or {}), highlight
        attacks, defenses = (list(dict.fromkeys(row[name] for row in rows)) for name in ("attack", "defense"))
        seeds = sorted({row["seed"] for row in rows})
        super().__init__(
            {
                "defense": W.SelectionSlider(options=defenses, description="Removal"),
                "attack": W.SelectionSlider(options=[ALL, *attacks], description="Attack"),
                "seed": W.SelectionSlider(options=[ALL_SEEDS, *map(str, seeds)], description="Seed"),
                "rate": W.SelectionSlider(options=list(RATES), value=list(RATES)[-1], description="Rate"),
            }
        )

    def compute(self, *, defense: str, attack: str, seed: str, rate: str) -> Bars:
        """Mean and worst over the attacks and seeds chosen."""
        column, best = RATES[rate]
        chosen = [row for row in self.rows if row["defense"] == defense and attack in (ALL, row["attack"])]
        chosen = [row for row in chosen if seed in (ALL_SEEDS, str(row["seed"]))]
        found = summarise(chosen, ("source",))
        found.sort(key=lambda row: row[column], reverse=best is max)
        return Bars(
            rate,
            {row["source"]: 100 * row[column] for row in found},
            {row["source"]: 100 * row[f"worst_{column}"] for row in found},
            {row["source"]: row["cells"] for row in found},
        )

    def figure(self, result: Bars) -> Figure:
        """A bar a source, best at the top; a diamond for the worst cell."""
        count = len(result.mean)
        figure = Figure(figsize=(8, 1.1 + 0.34 * count), layout="constrained")
        axes = figure.subplots()
        colors = [VERMILLION if source == self.highlight else BLUE for source in result.mean]
        bars = axes.barh(range(count), list(result.mean.values()), color=colors)
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.plot(list(result.worst.values()), range(count), "D", color="black", markersize=5, label="worst removal")
        axes.set(yticks=range(count), yticklabels=self._labels(result))
        axes.set(xlim=(0, 108), xlabel=f"{result.shown}, mean in %")
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return figure

    def _labels(self, result: Bars) -> list[str]:
        """Names of the sources, with their removals where some have fewer: the study is still running."""
        names = {source: self.names.get(source, source) for source in result.mean}
        if len(set(result.cells.values())) > 1:
            names = {source: f"{name} ({result.cells[source]} removals)" for source, name in names.items()}
        return list(names.values())

    def describe(self, result: Bars) -> tuple[str, str, dict[str, Any]]:
        """Alternative text, caption and numbers."""
        alt = f"Bars of {result.shown} by source of the samples, best first, with the worst removal of each."
        if not result.mean:
            return alt, "No removal of this kind is in the study.", {"best": "", "mean": float("nan")}
        first = next(iter(result.mean))
        numbers = {"best": first, "mean": result.mean[first]}
        caption = (
            f"Best: {self.names.get(first, first)}, {result.mean[first]:.1f} % over {result.cells[first]} removals."
        )
        return alt, caption, numbers
