"""The picture of a study: attack success and accuracy after removal, by source of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from smi.study.results import Row


def plot_sources(rows: Sequence[Row]) -> Figure:
    """Two panels, ASR and ACC in percent: a dot a cell, a bar the mean, sources in the order of the rows."""
    names = list(dict.fromkeys(row["source"] for row in rows))
    figure = Figure(figsize=(10, 0.45 * len(names) + 1.4), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    for panel, key, title in zip(panels, ("asr", "acc"), ("attack success %", "accuracy %"), strict=True):
        for place, name in enumerate(names):
            values = [100 * row[key] for row in rows if row["source"] == name]
            panel.plot(values, [place] * len(values), "o", color="#0072b2", alpha=0.35, markersize=5)
            panel.plot([sum(values) / len(values)], [place], "|", color="black", markersize=18, markeredgewidth=2)
        panel.set_xlabel(f"{title} after removal")
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    panels[0].set_xlim(-2, 102)
    return figure
