"""The figures of the analysis. Colours are Okabe and Ito's, which any colour vision tells apart; markers differ too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from smi.analysis.correlation import rank_correlation
from smi.analysis.path import LN2, Path
from smi.analysis.study import DEFENSE
from smi.analysis.theorem import TwoPixels, gaussian_ball_mass
from smi.errors import InputError, unknown_name
from smi.plotting.report import BLUE, GREEN, ORANGE, PINK, RED
from smi.study.results import Row

GREY, SKY = "#8A8A8A", "#56B4E9"
MARKS = {
    "clean": ("black", "*"), "public": (GREY, "s"), "random": (GREY, "p"), "pixel": (ORANGE, "X"),
    "deepinversion": (RED, "P"), "latent": (SKY, "o"), "input": (GREEN, "^"), "parameter": (PINK, "v"),
    "smi": (BLUE, "D"),
}  # fmt: skip
OTHER = ("black", "x")  # a source that was registered elsewhere

OUTCOMES = {
    "acc": "accuracy after removal, %",
    "asr": "attack success after removal, %",
    "der": "defense effectiveness (DER), %\n(50: no effect)",
}
SIMILARITIES = {
    "frechet": "Fréchet distance to real images",
    "nearest": "distance to the nearest real image\n(real images: 1)",
    "judge_accuracy": "share that an independent\nclassifier recognises, %",
}
STABILITIES = {
    "score_joint": "stability score, input and weights\n(lower is more stable)",
    "score_input": "stability score, input only",
    "score_parameter": "stability score, weights only",
}
PERCENT = {*OUTCOMES, "judge_accuracy"}
FLOOR = 1e-6  # losses below are drawn here: a logarithmic axis has no zero


def similarity_and_outcome(rows: Sequence[Row], outcome: str = "der", defense: str = DEFENSE) -> Figure:
    """Perceptual similarity of the samples against the outcome of removal, a point a sample set.

    Args:
        rows: Of `analyse`.
        outcome: "acc", "asr" or "der".
        defense: Whose rows are drawn.
    """
    return _scatters(rows, SIMILARITIES, outcome, defense)


def stability_and_outcome(rows: Sequence[Row], outcome: str = "der", defense: str = DEFENSE) -> Figure:
    """Median stability scores of the samples against the outcome of removal, a point a sample set."""
    return _scatters(rows, STABILITIES, outcome, defense)


def presence_by_source(rows: Sequence[Row], defense: str = DEFENSE) -> Figure:
    """What share of the samples a detector takes for stamped: as they are, and, to show that it sees, once stamped."""
    chosen = _of(rows, defense)
    names = list(dict.fromkeys(row["source"] for row in chosen))
    figure = Figure(figsize=(9.5, 0.42 * len(names) + 1.9), layout="constrained")
    _presence(figure, chosen, names)
    return figure


def overview(rows: Sequence[Row], outcome: str = "der", defense: str = DEFENSE) -> Figure:
    """Similarity, stability and trigger presence of a study's samples on one page."""
    chosen = _of(rows, defense)
    names = list(dict.fromkeys(row["source"] for row in chosen))
    figure = Figure(figsize=(9.5, 5.9 + 0.3 * len(names)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(4.2, 1.7 + 0.3 * len(names)))
    above, below = parts
    left, right = above.subplots(1, 2, sharey=True)
    _scatter(left, chosen, "frechet", SIMILARITIES["frechet"], outcome)
    _scatter(right, chosen, "score_joint", STABILITIES["score_joint"], outcome)
    left.set_ylabel(OUTCOMES[outcome])
    above.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    _presence(below, chosen, names)
    return figure


def path_figure(path: Path, scores: Tensor, labels: Tensor | None = None) -> Figure:
    """A removal in three panels.

    The loss of the most and of the least stable tenth of the probes along it; score against worst loss; and how far the
    weights went.

    Args:
        path: Of `loss_along_path`.
        scores: Stability ``[N]`` of the probes on the suspect model.
        labels: Their classes ``[N]``, to tell whether score and loss go together inside a class too, since a removal
            moves some classes more than others. The tenths are then those of each class.
    """
    if len(scores) != path.loss.shape[1]:
        raise InputError(
            f"There are {len(scores)} scores for {path.loss.shape[1]} probes. Score the probes themselves."
        )
    figure = Figure(figsize=(11.5, 3.7), layout="constrained")
    losses, scatter, weights = figure.subplots(1, 3)
    order, tenth = _most_stable_first(scores, labels), max(1, len(scores) // 10)
    of_each = "" if labels is None else " of each class"
    kinds = (
        (f"most stable tenth{of_each}", order[:tenth], BLUE, "o", "-"),
        (f"least stable tenth{of_each}", order[-tenth:], RED, "s", "--"),
    )
    worst = path.worst.clamp(min=FLOOR)
    scatter.plot(scores, worst, ".", color=GREY, markersize=5, label="other probes")
    for name, index, colour, marker, dash in kinds:
        of_kind = path.loss[:, index].clamp(min=FLOOR)
        low, middle, high = torch.quantile(of_kind, torch.tensor([0.1, 0.5, 0.9]), dim=1)
        losses.fill_between(range(len(middle)), low, high, color=colour, alpha=0.18, linewidth=0)
        losses.plot(middle, color=colour, marker=marker, ls=dash, ms=4, markevery=max(1, len(middle) // 10), label=name)
        scatter.plot(scores[index], worst[index], marker, color=colour, markersize=4.5, label=name)
    losses.set(yscale="log", xlabel="round of the removal", ylabel="cross-entropy to the label, nats")
    losses.set_title("median, and 10 to 90 % of the probes", fontsize=10)
    scatter.set_xscale("log" if scores.min() > 0 else "linear")
    scatter.set(yscale="log", xlabel="stability score on the suspect model",
                ylabel="largest loss on the path, nats")  # fmt: skip
    scatter.set_title(
        _correlation(scores.tolist(), path.worst.tolist(), None if labels is None else labels.tolist(), "class"),
        fontsize=10,
    )
    for axes in (losses, scatter):
        axes.axhline(LN2, color="black", ls=":", lw=1)
        axes.annotate("ln 2", (1, LN2), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", fontsize=8)  # fmt: skip
    _logarithmic(losses.yaxis)
    _logarithmic(scatter.yaxis)
    losses.legend(fontsize=8, frameon=False)
    _moved(weights, path)
    _finish((losses, scatter, weights))
    return figure


def theorem_figure(
    world: TwoPixels | None = None, *, centre: float = 1.0, reach: float = 0.1, dims: Sequence[int] = range(2, 65)
) -> Figure:
    """Both sides of the inequality in the two-pixel world against the slack s, and μ against the number of dimensions.

    Args:
        world: The default one if None.
        centre: R.
        reach: r.
        dims: Numbers of dimensions for which μ is drawn.
    """
    world = world or TwoPixels()
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    sides, mass = figure.subplots(1, 2)
    slack = np.linspace(0.02, 2.5, 250)
    bounds = [world.bound(centre=centre, reach=reach, slack=float(s)) for s in slack]
    left, right = np.array([b.left for b in bounds]), np.array([b.right for b in bounds])
    sides.plot(slack, left, color=RED, ls="--", label=r"$P_{\mathrm{pub}}[A_{r+2s}] + \eta/s$")
    sides.plot(slack, right, color=BLUE, label=r"$\mu(R, s/\Lambda)$")
    sides.fill_between(slack, left, right, where=list(left < right), color=GREEN, alpha=0.25, linewidth=0,
                       label="no latent carries the trigger")  # fmt: skip
    sides.set(xlabel="slack s, in pixel values", ylabel="probability", ylim=(0, 1), xlim=(0, slack[-1]))
    sides.set_title(
        f"two pixels: Λ = {world.lipschitz:g}, η = {world.eta:g}, R = {centre:g}, r = {reach:g},\n"
        f"trigger at {world.trigger:g}; nearest latent at {world.closest(centre):g}", fontsize=10,
    )  # fmt: skip
    sides.legend(fontsize=9, frameon=False)
    styles = ((4.0, GREEN, "^", "-."), (2.0, BLUE, "o", "-"), (1.0, ORANGE, "s", "--"))
    for radius, colour, marker, dash in styles:
        values = [gaussian_ball_mass(math.sqrt(d), radius, d) for d in dims]
        mass.plot(dims, values, color=colour, marker=marker, ls=dash, ms=4, markevery=max(1, len(dims) // 8),
                  label=f"s/Λ = {radius:g}")  # fmt: skip
    mass.axhline(1 / 50_000, color="black", ls=":", lw=1)
    mass.annotate("one image in 50,000", (1, 1 / 50_000), (-2, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    mass.set(yscale="log", xlabel="dimensions d of the latent", ylabel=r"$\mu(\sqrt{d}, s/\Lambda)$")
    mass.set_title("what both terms on the left must stay below", fontsize=10)
    mass.legend(fontsize=9, frameon=False, loc="lower left")
    _finish((sides, mass))
    return figure


def _scatters(rows: Sequence[Row], columns: Mapping[str, str], outcome: str, defense: str) -> Figure:
    chosen = _of(rows, defense)
    figure = Figure(figsize=(3.9 * len(columns) + 0.4, 4.5), layout="constrained")
    panels: Any = figure.subplots(1, len(columns), sharey=True)
    for axes, (column, label) in zip(panels, columns.items(), strict=True):
        _scatter(axes, chosen, column, label, outcome)
    panels[0].set_ylabel(OUTCOMES[outcome])
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return figure


def _scatter(axes: Axes, rows: Sequence[Row], column: str, label: str, outcome: str) -> None:
    if outcome not in OUTCOMES:
        raise unknown_name("outcome", outcome, OUTCOMES)
    factor = {name: 100 if name in PERCENT else 1 for name in (column, outcome)}
    for source in dict.fromkeys(row["source"] for row in rows):
        colour, marker = MARKS.get(source, OTHER)
        points = [(factor[column] * r[column], factor[outcome] * r[outcome]) for r in rows if r["source"] == source]
        axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=8 if marker == "*" else 6, alpha=0.75,
                  markeredgewidth=0.5, markeredgecolor="white", label=source)  # fmt: skip
    values, results = [row[column] for row in rows], [row[outcome] for row in rows]
    victims = [(row["domain"], row["attack"], row["seed"]) for row in rows]
    axes.set_xlabel(label)
    if column not in PERCENT and min(values) > 0:
        axes.set_xscale("log")
        _logarithmic(axes.xaxis)
    axes.set_title(_correlation(values, results, victims, "victim"), fontsize=9)
    _finish((axes,))


def _presence(figure: FigureBase, rows: Sequence[Row], names: Sequence[str]) -> None:
    kinds = (
        ("presence_target", "detector_false_alarms", "samples of the target class, as they are", "clean test images"),
        ("presence_if_stamped", "detector_hits", "all samples, once stamped", "stamped test images"),
    )
    panels: Any = figure.subplots(1, 2, sharey=True)
    for axes, (column, rate, title, control) in zip(panels, kinds, strict=True):
        for place, name in enumerate(names):
            colour, marker = MARKS.get(name, OTHER)
            values = [100 * row[column] for row in rows if row["source"] == name and row[column] is not None]
            axes.plot(values, [place] * len(values), marker, color=colour, alpha=0.6, markersize=6, clip_on=False)
            if values:
                axes.plot([np.median(values)], [place], "|", color="black", markersize=18, markeredgewidth=2)
        usual = 100 * float(np.median([row[rate] for row in rows]))
        axes.axvline(usual, color=GREY, ls=":", label=f"{control}: {usual:.1f} %")
        axes.set(xlabel="taken for stamped, %", xlim=(-3, 103))
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, -0.02))
        _finish((axes,))
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) + 0.1, -0.6)


def _most_stable_first(scores: Tensor, labels: Tensor | None) -> Tensor:
    """Positions from most to least stable; with labels, by rank inside the class, as a share of it."""
    share = scores.double().clone()
    for label in [] if labels is None else labels.unique():
        members = labels == label
        share[members] = (scores[members].argsort(stable=True).argsort().double() + 0.5) / members.sum()
    return share.argsort(stable=True)


def _moved(axes: Axes, path: Path) -> None:
    """The relative distance of the weights from the suspect model's, in percent."""
    finite = path.furthest.isfinite()
    moved, names = path.distance[:, finite] * 100, [name for name, good in zip(path.names, finite, strict=True) if good]
    furthest, every = int(moved.amax(0).argmax()), max(1, len(moved) // 10)
    axes.plot(moved[:, furthest], color=RED, marker="^", ls="--", ms=4, markevery=every, label=names[furthest])
    axes.plot(moved.median(1).values, color=BLUE, marker="o", ms=4, markevery=every, label="median tensor")
    axes.set(xlabel="round of the removal", ylabel="‖θ' − θ‖ / ‖θ‖ of a tensor, %")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("how far the weights go", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def _of(rows: Sequence[Row], defense: str) -> list[Row]:
    chosen = [row for row in rows if row["defense"] == defense]
    if not chosen:
        raise InputError(f"There is no row of the defense {defense!r}. Run the study first, or name another defense.")
    return chosen


def _logarithmic(axis: Axis) -> None:
    """Ticks that stay readable on less than a decade, where matplotlib's own run into each other, and on several."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 3000 * low else (1,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _correlation(x: Sequence[float], y: Sequence[float], groups: Sequence[Any] | None, group: str) -> str:
    """ρ with its interval, and, with groups, the same inside them; says so where there is none."""
    lines = []
    for name, within in (("ρ", False), (f"inside each {group} ρ", True)):
        if within and groups is None:
            continue
        try:
            found = rank_correlation(x, y, groups, within=within)
        except InputError:
            lines.append(f"{name} is not defined")
            continue
        interval = f"one {group}" if math.isnan(found.low) else f"95 %: {found.low:.2f} to {found.high:.2f}"
        lines.append(f"{name} = {found.rho:.2f} ({interval})".replace("-", "−"))
    return "\n".join(lines)


def _finish(every: Sequence[Axes]) -> None:
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.grid(alpha=0.25)
