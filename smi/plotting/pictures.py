"""Figures as notebooks show them: drawn without pyplot, with alternative text, the same bytes for the same content."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

# Okabe & Ito's palette: told apart with any colour vision, and in grey.
BLUE, VERMILLION = "#0072B2", "#D55E00"


class Picture:
    """A rendered figure. Shown last in a cell it is the picture, with ``alt`` where pictures are not shown.

    Attributes:
        png: The picture as bytes of a PNG.
        alt: What the figure shows, in words; it is also the `repr`, so it must be the same on every machine.
    """

    def __init__(self, figure: Figure, alt: str, *, dpi: int = 100) -> None:
        buffer = io.BytesIO()
        # The background is opaque: axes drawn in black vanish on a dark theme otherwise.
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
        self.png, self.alt = buffer.getvalue(), alt

    def __repr__(self) -> str:
        return f"Picture: {self.alt}"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"image/png": self.base64, "text/plain": repr(self)}

    @property
    def base64(self) -> str:
        """The PNG as base64."""
        return base64.b64encode(self.png).decode()

    def html(self, caption: str) -> str:
        """``<figure>`` with the picture, its alternative text and a caption."""
        return (
            f'<figure style="margin:0"><img alt="{html.escape(self.alt)}" style="max-width:100%" '
            f'src="data:image/png;base64,{self.base64}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        )


def image_row(axes: Axes, images: Tensor, labels: Sequence[str] = (), colors: Sequence[str] = ()) -> None:
    """Draw images ``[N, C, H, W]`` in [0, 1] side by side on one axes, image i at x = i, with labels below.

    One picture for all of them: an axes each takes ten times as long.
    """
    framed = F.pad(images.detach().cpu().float(), (1, 1, 1, 1), value=1.0)  # white gaps between dark images
    strip = torch.cat(list(framed), dim=2).permute(1, 2, 0)
    height = strip.shape[0] / framed.shape[3]
    cmap = "gray" if strip.shape[2] == 1 else None
    axes.imshow(
        strip.squeeze(2).numpy(), cmap=cmap, vmin=0, vmax=1, extent=(-0.5, len(images) - 0.5, 0, height), aspect="equal"
    )
    axes.set_xticks(range(len(images)), list(labels) or [""] * len(images))
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for text, color in zip(axes.get_xticklabels(), colors, strict=False):
        text.set_color(color)


def answered_row(axes: Axes, images: Tensor, answers: Sequence[int], target: int) -> None:
    """`image_row` with a model's answers below; a cross and colour mark those that say ``target``."""
    labels = [f'✕ "{answer}"' if answer == target else f'"{answer}"' for answer in answers]
    image_row(axes, images, labels, [VERMILLION if answer == target else BLUE for answer in answers])
