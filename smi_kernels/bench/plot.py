"""A dot plot of speed relative to the eager loop."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smi_kernels.bench.records import CEILING, OURS, PEERS, Record, write_atomic
from smi_kernels.errors import InputError

FORMATS = (".png", ".svg", ".pdf")

# Okabe and Ito's colours, which the colour-blind can tell apart; the shapes differ as well.
_PEER_STYLE = dict(zip(PEERS, [("#999999", "o"), ("#D55E00", "s"), ("#56B4E9", "^"), ("#009E73", "v")], strict=True))
_OUR_STYLES = [("#0072B2", "D"), ("#E69F00", "P"), ("#CC79A7", "X"), ("#F0E442", "*")]
_TICKS = [0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100, 200, 500]


def check_plot(file: Path) -> None:
    """Raise `InputError` for a format that is not in `FORMATS`."""
    if file.suffix not in FORMATS:
        raise InputError(f"The plot {file} has no known format. Allowed: {', '.join(FORMATS)}.")


def plot(records: Sequence[Record], file: Path, title: str) -> None:
    """Draw a line for each point of the grid and a dot for each variant; the ceiling is a black bar."""
    from matplotlib.figure import Figure

    points = list(dict.fromkeys((r["model"], r["n"], r["k"]) for r in records))
    figure = Figure(figsize=(8, 1.7 + 0.32 * len(points)), layout="constrained")
    axes = figure.add_subplot()
    for label, options, chosen in _series(records):
        x = [r["vs_eager"] or 0.0 for r in chosen]
        y = [points.index((r["model"], r["n"], r["k"])) for r in chosen]
        axes.scatter(x, y, label=label, **options)
    axes.axvline(1, color="#999999", linewidth=1, zorder=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()  # ticks by hand: matplotlib labels only powers of ten, and few fit between
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(points)), [f"{model}, N={n}, K={k}" for model, n, k in points])
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.grid(axis="y", color="#DDDDDD", zorder=0)
    axes.set_xlabel("speed relative to the eager loop (right is faster, logarithmic)")
    axes.set_title(title, fontsize="medium", loc="left")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=file.suffix[1:], dpi=150)
    write_atomic(file, buffer.getvalue())


def _series(records: Sequence[Record]) -> list[tuple[str, dict[str, Any], list[Record]]]:
    """Label, style and records of each variant that was compared with eager."""
    timed = [r for r in records if r["vs_eager"] is not None]
    series: list[tuple[str, dict[str, Any], list[Record]]] = []
    for name, (colour, marker) in _PEER_STYLE.items():
        chosen = [r for r in timed if r["variant"] == name]
        series.append((name, {"color": colour, "marker": marker, "s": 28, "zorder": 3}, chosen))
    families = list(dict.fromkeys(r["family"] for r in timed if r["variant"] == OURS))
    for i, family in enumerate(families):
        colour, marker = _OUR_STYLES[i % len(_OUR_STYLES)]
        options = {"color": colour, "marker": marker, "s": 55, "zorder": 4, "edgecolor": "black", "linewidth": 0.6}
        series.append((f"smi, {family}", options, [r for r in timed if r["variant"] == OURS and r["family"] == family]))
    bar = {"color": "black", "marker": "|", "s": 160, "linewidth": 2.2, "zorder": 2}
    series.append(("ceiling: no noise", bar, [r for r in timed if r["variant"] == CEILING]))
    return [entry for entry in series if entry[2]]
