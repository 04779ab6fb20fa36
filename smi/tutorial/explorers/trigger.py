"""Which triggers does a backdoored model obey? The reader changes the trigger, and the digits fall or do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ipywidgets as W
from matplotlib.figure import Figure
from torch import Tensor, nn

from smi.attacks import BadNets, Blended
from smi.domains.base import PrivateSet
from smi.plotting.pictures import answered_row, image_row
from smi.runtime.checks import check_number
from smi.runtime.compute import predict
from smi.tutorial.explorers.base import Explorer

SHOWN, MEASURED = 9, 300  # images in the picture, and for the rate


@dataclass(frozen=True, eq=False)
class Stamped:
    """What a trigger does to test images of other classes.

    Attributes:
        images: ``[9, C, H, W]``.
        stamped: The same with the trigger.
        answers: Of the model to ``stamped``.
        asr: Share of more such images that the model takes for the target.
        moved: Mean L2 norm of the change.
        poisoned: Training images to be changed.
    """

    images: Tensor
    stamped: Tensor
    answers: list[int]
    asr: float
    moved: float
    poisoned: int


class TriggerExplorer(Explorer):
    """Test images with a trigger of the reader's choice, and the model's answers.

    Args:
        model: Images in [0, 1] to logits, with a backdoor to class ``target``.
        test: Labelled images.
        train_size: Of the training set, for what a poison rate means in images.
        target: The class that stamped images are sent to.
    """

    def __init__(self, model: nn.Module, test: PrivateSet, *, train_size: int, target: int = 0) -> None:
        check_number("train_size", train_size, low=1, integer=True)
        others = test.labels != target
        self.model, self.target, self.train_size = model.eval(), target, train_size
        self.images, labels = test.images[others][:MEASURED], test.labels[others][:MEASURED]
        first = [int((labels == c).nonzero()[0]) for c in labels.unique().tolist()]
        self.shown = self.images[first[:SHOWN]]
        super().__init__(
            {
                "trigger": W.SelectionSlider(
                    options=[("badnets: square", "badnets"), ("blended: picture", "blended")],
                    description="Trigger",
                ),
                "size": W.IntSlider(4, min=1, max=10, description="Side, pixels"),
                "opacity": W.FloatSlider(1.0, min=0, max=1, step=0.05, description="Opacity, 0 to 1"),
                "rate": W.FloatSlider(0.1, min=0, max=0.2, step=0.005, readout_format=".1%", description="Poison rate"),
            }
        )

    def compute(self, *, trigger: str, size: int, opacity: float, rate: float) -> Stamped:
        """Stamp and ask the model.

        Args:
            trigger: "badnets" or "blended".
            size: Of the square in pixels; the blended picture has none.
            opacity: Of the trigger, in [0, 1].
            rate: Share of the training images to poison, in [0, 1].
        """
        attack = BadNets(size=size) if trigger == "badnets" else Blended(alpha=1.0)
        stamped = self.images.lerp(attack.stamp(self.images), opacity)
        shown = self.shown.lerp(attack.stamp(self.shown), opacity)
        asr = (predict(self.model, stamped).argmax(1) == self.target).float().mean().item()
        answers = predict(self.model, shown).argmax(1).tolist()
        moved = (stamped - self.images).flatten(1).norm(dim=1).mean().item()
        return Stamped(self.shown, shown, answers, asr, moved, round(rate * self.train_size))

    def figure(self, result: Stamped) -> Figure:
        """The images without and with the trigger, and the answers below."""
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        clean, stamped = figure.subplots(2, 1)
        image_row(clean, result.images)
        answered_row(stamped, result.stamped, result.answers, self.target)
        clean.set_title(f"without and with the trigger; ✕: taken for {self.target}", fontsize=10)
        return figure

    def describe(self, result: Stamped) -> tuple[str, str, dict[str, Any]]:
        """Alternative text, caption and numbers."""
        alt = f"{len(result.images)} images without and with the trigger, with the model's answer below each."
        caption = (
            f"ASR {100 * result.asr:.0f} %; mean change of an image (L2 norm) {result.moved:.2g}; "
            f"{result.poisoned:,} of {self.train_size:,} training images poisoned."
        )
        return alt, caption, {"asr": result.asr, "moved": result.moved, "poisoned": result.poisoned}
