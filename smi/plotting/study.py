"""The picture of a study: what removal leaves of each backdoor and what it costs, by source of the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from smi.study.results import Row

NONE = "no removal"
WORST_LOSS = 15.0  # points of accuracy at which the scale ends


def plot_rates(rows: Sequence[Row], order: Sequence[str] = ()) -> Figure:
    """Two tables of means in percent, dark where it is bad: attack success left, and points of accuracy lost.

    A line an attack (and domain, where there are several) with the mean of all at the end; a column a source, with its
    cells where it has fewer than another (the study is running); before them stands what there was before.

    Args:
        rows: Cells of one defense.
        order: Sources whose columns come first.
    """
    several = len({row["domain"] for row in rows}) > 1
    titles = [f"{row['domain']} {row['attack']}" if several else row["attack"] for row in rows]
    attacks = list(dict.fromkeys(titles))
    found = dict.fromkeys(row["source"] for row in rows)
    columns = [name for name in dict.fromkeys([*order, *found]) if name in found]
    lines = [[row for row, title in zip(rows, titles, strict=True) if title == attack] for attack in attacks]
    lines.append([row for line in lines for row in line])
    cells = {name: sum(row["source"] == name for row in rows) for name in columns}
    most = max(cells.values())
    labels = [name if cells[name] == most else f"{name}, {cells[name]} of {most}" for name in columns]
    left = _means(lines, columns, lambda row: row["asr"], lambda row: row["asr_before"])
    lost = _means(lines, columns, lambda row: row["acc_before"] - row["acc"], lambda row: 0.0)[:, 1:]
    figure = Figure(figsize=(0.62 * (2 * len(columns) + 1) + 1.8, 0.3 * len(lines) + 1.9), layout="constrained")
    panels: Any = figure.subplots(1, 2, width_ratios=(len(columns) + 1, len(columns)), sharey=True)
    for panel, values, names, end, title in (
        (panels[0], left, [NONE, *labels], 100.0, "attack success left, %"),
        (panels[1], lost, labels, WORST_LOSS, "accuracy lost, points"),
    ):
        panel.imshow(values, cmap="Blues", vmin=0, vmax=1.2 * end, aspect="auto")
        for (line, position), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if value > 0.75 * end else "black"
                panel.text(position, line, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
        panel.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
        panel.set_title(title, fontsize=10)
        panel.axhline(len(lines) - 1.5, color="black", linewidth=1)
        panel.tick_params(length=0)
    panels[0].set_yticks(range(len(lines)), [*attacks, "mean"])
    return figure


def _means(
    lines: Sequence[Sequence[Row]], columns: Sequence[str], rate: Callable[[Row], float], before: Callable[[Row], float]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Percent ``[lines, 1 + columns]``, what there was before first; NaN where no cell is finished."""
    made = np.full((len(lines), 1 + len(columns)), np.nan)
    for place, line in enumerate(lines):
        made[place, 0] = 100 * np.mean([before(row) for row in line])
        for position, source in enumerate(columns, 1):
            values = [rate(row) for row in line if row["source"] == source]
            if values:
                made[place, position] = 100 * np.mean(values)
    return made
