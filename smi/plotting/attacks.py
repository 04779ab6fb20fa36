"""A picture of the attacks: what each trigger does to one image.

The README's was made by ``python -m smi.plotting.attacks notebooks/results/attacks.png``: one digit of the training set
and every attack with its default settings. Those that optimise their trigger do so against one classifier trained on
the clean images with seed 100; the input-aware attack, which trains trigger and victim together, takes 12 epochs.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from smi.attacks.base import Attack, attacks
from smi.domains.base import PrivateSet
from smi.errors import InputError
from smi.models.classifiers import TrainConfig, train_classifier
from smi.runtime.files import write_atomic

COLUMNS = 3
FACTORS = (100, 50, 20, 10, 5, 3, 2, 1)  # by which a difference may be magnified
SEED = 100
THREE = 28  # a digit of the training set that is easily read


def draw_attacks(
    data: PrivateSet,
    names: Sequence[str] | None = None,
    *,
    index: int | None = None,
    surrogate: nn.Module | None = None,
    seed: int = SEED,
) -> Figure:
    """For every attack an image, the same stamped, and the difference, magnified: purple is brighter, orange darker.

    Args:
        data: Training images, for the attacks that are fitted.
        names: Of registered attacks; None for all.
        index: Of the image in ``data``; None for the first that is not of the target class 0.
        surrogate: A classifier trained on clean images; trained here where an attack needs one and it is None.
        seed: Of everything random.

    Raises:
        InputError: For an unknown name, an index that does not exist, or images on which a trigger does not fit.
    """
    chosen = {name: attacks[name]() for name in (attacks if names is None else names)}
    if not chosen:
        raise InputError(f"No attacks are named. Allowed: {', '.join(attacks)}.")
    index = int((data.labels != 0).nonzero()[0]) if index is None else index
    if not 0 <= index < len(data):
        raise InputError(f"index is {index}. Allowed: 0 to {len(data) - 1}, as there are {len(data)} images.")
    if surrogate is None and any(attack.needs_surrogate for attack in chosen.values()):
        surrogate = train_classifier(data, seed=seed)
    clean, rows = data.images[index : index + 1], math.ceil(len(chosen) / COLUMNS)
    figure = Figure(figsize=(9, 1.45 * rows), layout="constrained", facecolor="white")
    blocks = figure.subfigures(rows, COLUMNS, squeeze=False, wspace=0.05, hspace=0.1).ravel()
    for block, (name, attack) in zip(blocks, chosen.items(), strict=False):
        block.suptitle(name, fontsize=10, weight="bold", y=0.97, va="top")
        _draw(block.subplots(1, 3), clean, _fitted(attack, data, surrogate, seed).stamp(clean))
    return figure


def _fitted(attack: Attack, data: PrivateSet, surrogate: nn.Module | None, seed: int) -> Attack:
    """The attack, ready to stamp."""
    fitted = attack.fit(data, surrogate, seed=seed)
    if type(attack).train is not Attack.train:  # its trigger is made in training
        _, fitted = fitted.train(data, TrainConfig(), attack.rate, seed)
    return fitted


def _draw(axes: Sequence[Axes], clean: Tensor, stamped: Tensor) -> None:
    """One attack: images ``[1, C, H, W]`` before and after, and the difference, its mean over the channels."""
    difference = (stamped - clean).mean(1)[0]
    factor = next((f for f in FACTORS if f * difference.abs().max() <= 1), 1)
    for panel, image, title in zip(axes, (clean, stamped), ("clean", "stamped"), strict=False):
        panel.imshow(image[0].permute(1, 2, 0).expand(-1, -1, 3).numpy(), vmin=0, vmax=1)
        panel.set_xlabel(title, fontsize=9, labelpad=2)
    axes[2].imshow((factor * difference).numpy(), cmap="PuOr", vmin=-1, vmax=1)
    axes[2].set_xlabel(f"difference × {factor}", fontsize=9, labelpad=2)
    for panel in axes:
        panel.set(xticks=[], yticks=[])
        for spine in panel.spines.values():
            spine.set(color="#999999", linewidth=0.6)


def main(path: Path) -> None:
    """Draw all attacks on digits."""
    from smi.domains import load_domain

    torch.set_num_threads(1)  # one thread, so that the picture is the same on every machine
    buffer = io.BytesIO()
    figure = draw_attacks(load_domain("digits").private.train, index=THREE)
    figure.savefig(buffer, dpi=200, bbox_inches="tight", pad_inches=0.06, metadata={"Software": None})
    write_atomic(path, buffer.getvalue())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python -m smi.plotting.attacks FILE.png")
    main(Path(sys.argv[1]))
