"""The report's figures, as PNG on white. Drawn at the width of a phone, so that nothing in them needs zooming in.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; lines differ in marker and dash as well.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from smi.domains.base import Samples

WIDTH = 3.9  # inches
DPI = 200
BLUE, ORANGE, GREEN, PINK, RED = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
STROKES = [(BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (PINK, "D", ":")]
NAME_LENGTH = 12


def label_text(name: str, length: int = NAME_LENGTH) -> str:
    """A class name as a label: on one line, and cut to ``length``.

    It has no dollar sign that matplotlib takes for mathematics.
    """
    line = " ".join(name.split())
    return (line if len(line) <= length else line[: length - 1] + "…").replace("$", r"\$")


def score_unit(scores: Tensor) -> int:
    """The power of ten that stability scores are best read in: that of their median."""
    median = scores[scores.isfinite()].median().item() if scores.isfinite().any() else 0.0
    return math.floor(math.log10(median)) if median > 0 else 0


def reconstructions(samples: Samples, classes: Sequence[str], labels: Sequence[int], shown: int = 5) -> bytes:
    """A row for each class of ``labels``: ``shown`` images from the most to the least stable, scores below them."""
    index = torch.stack([_spread(samples, label, shown) for label in labels])
    tile, gap = samples.images.shape[2:], samples.images.shape[2] // 4 if samples.scores is not None else 2
    axes, figure = _canvas(_mosaic(samples.images[index], gap), above=gap)
    step_y, step_x = tile[0] + gap, tile[1] + 2
    axes.set_yticks([row * step_y + tile[0] / 2 for row in range(len(labels))])
    axes.set_yticklabels([_row_label(samples, classes, label) for label in labels], fontsize=8)
    if samples.scores is not None:
        unit = 10.0 ** score_unit(samples.scores)
        for row, column in np.ndindex(index.shape):
            score = samples.scores[index[row, column]].item() / unit
            x, y = column * step_x + tile[1] / 2, row * step_y + tile[0] + gap / 2
            axes.text(x, y, f"{score:.1f}", fontsize=8, ha="center", va="center")
        axes.text(0, -gap / 2, "most stable", fontsize=8, va="center")
        axes.text(shown * step_x - 2, -gap / 2, "least stable", fontsize=8, va="center", ha="right")
    return _png(figure)


def stamps(clean: Tensor, stamped: Tensor, columns: Sequence[tuple[str, str]]) -> bytes:
    """Images without the trigger above the same with it, and below them what two models say to the latter."""
    gap = 3
    axes, figure = _canvas(_mosaic(torch.stack([clean, stamped]), gap), below=0.6 * clean.shape[2])
    height, width = clean.shape[2:]
    below = 2 * (height + gap)
    axes.set_yticks([height / 2, height * 1.5 + gap, below + height * 0.15, below + height * 0.42])
    axes.set_yticklabels(["clean", "with trigger", "suspect says", "repaired says"], fontsize=8)
    for column, answers in enumerate(columns):
        for line, answer in enumerate(answers):
            x, y = column * (width + 2) + width / 2, below + height * (0.15 + 0.27 * line)
            colour = RED if line == 0 else BLUE
            axes.text(x, y, label_text(answer, 9), fontsize=8, ha="center", va="center", color=colour, weight="bold")
    return _png(figure)


def pattern(delta: Tensor) -> bytes:
    """δ ``[C, H, W]``, mean over channels, orange where it darkens and purple where it brightens."""
    limit = delta.mean(0).abs().flatten().quantile(0.995).item() or 1.0  # a few pixels must not pale the rest
    figure = Figure(figsize=(WIDTH / 2, WIDTH / 2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set(xticks=[], yticks=[])
    axes.imshow(delta.mean(0).numpy(), cmap="PuOr", vmin=-limit, vmax=limit)
    return _png(figure)


def curves(lines: Mapping[str, Sequence[float]], unit: str = "round") -> bytes:
    """The loss of each run over the rounds (or another ``unit``)."""
    figure = Figure(figsize=(WIDTH, 2.1), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for (name, values), (colour, marker, dash) in zip(lines.items(), STROKES, strict=False):
        rounds = range(1, len(values) + 1)
        step = max(1, len(values) // 8)
        axes.plot(rounds, values, color=colour, marker=marker, ls=dash, markevery=step, ms=4, lw=1.4, label=name)
    axes.set_title("loss", fontsize=9, loc="left")
    axes.set_ylim(bottom=0)
    _plain(axes)
    axes.set_xlabel(unit, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(lines) > 1:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return _png(figure)


def stages(seconds: Mapping[str, float]) -> bytes:
    """A bar a stage; stages of controls, those with a slash in their name, are hatched."""
    figure = Figure(figsize=(WIDTH, 0.5 + 0.26 * len(seconds)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    names = list(seconds)[::-1]
    for place, name in enumerate(names):
        control = "/" in name
        axes.barh(
            place, seconds[name], height=0.7, edgecolor=BLUE, color="white" if control else BLUE,
            hatch="///" if control else None,
        )  # fmt: skip
        axes.annotate(f"{seconds[name]:.1f} s", (seconds[name], place), (4, 0), textcoords="offset points",
                      fontsize=8, va="center")  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds", fontsize=8)
    _plain(axes)
    return _png(figure)


def _canvas(pixels: np.ndarray, above: float = 0, below: float = 0) -> tuple[Axes, Figure]:
    """A mosaic over the whole width, with room for row labels at its left and text above and below."""
    height, width = pixels.shape[:2]
    inches = 0.1 + (WIDTH - 0.8) * (height + above + below) / width
    figure = Figure(figsize=(WIDTH, inches), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.imshow(pixels, interpolation="nearest", extent=(0, width, height, 0))
    axes.set_ylim(height + below, -above)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks([])
    return axes, figure


def _mosaic(images: Tensor, gap: int) -> np.ndarray:
    """``[R, K, C, H, W]`` in [0, 1] to ``[R · (H + gap), K · (W + 2) − 2, 3]`` on white."""
    rows, columns, channels, height, width = images.shape
    sheet = torch.ones(rows, columns, 3, height + gap, width + 2)
    sheet[..., :height, :width] = images.expand(rows, columns, 3, height, width) if channels == 1 else images
    flat = sheet.permute(0, 3, 1, 4, 2).reshape(rows * (height + gap), columns * (width + 2), 3)
    return flat[:, :-2].numpy()


def _spread(samples: Samples, label: int, count: int) -> Tensor:
    """Positions of ``count`` samples of a class, evenly from the most to the least stable (with repeats if few)."""
    index = (samples.labels == label).nonzero()[:, 0]
    if samples.scores is not None:
        index = index[samples.scores[index].argsort(stable=True)]
    return index[torch.linspace(0, len(index) - 1, count).round().long()]


def _row_label(samples: Samples, classes: Sequence[str], label: int) -> str:
    name = label_text(classes[label])
    if samples.scores is None:
        return name
    unit = 10.0 ** score_unit(samples.scores)
    return f"{name}\nmedian {samples.scores[samples.labels == label].median().item() / unit:.1f}"


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a class name in a script the font lacks; alt texts have it
        figure.savefig(buffer, dpi=DPI, bbox_inches="tight", pad_inches=0.06, metadata={"Software": None})
    return buffer.getvalue()
