"""Fine-tuning as papers run it: SGD on augmented samples, every BatchNorm normalising by the batch.

The project's own loop (`smi.defenses.training`) is another recipe: AdamW on the samples as they are, with the
statistics that BatchNorm has. Dropout stays off in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from smi.defenses.base import Defense
from smi.defenses.channels import NORMS
from smi.defenses.training import StepLoss
from smi.domains.base import Samples
from smi.errors import InputError
from smi.models.classifiers import AUGMENTATIONS
from smi.runtime.checks import check_number, device_of
from smi.runtime.compute import fast, unfrozen
from smi.runtime.job import Job, Loop


def trainable(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """A copy to train, and its BatchNorm layers, which are in train mode; the rest is in eval mode."""
    copied = unfrozen(model)
    return copied, [module.train() for module in copied.modules() if isinstance(module, NORMS)]


@dataclass(frozen=True, kw_only=True)
class Tuned(Defense):
    """Base of the defenses that train this way.

    Attributes:
        epochs: Passes over the samples.
        lr: Rate at the first step; it falls along one cosine.
        momentum: In [0, 1].
        weight_decay: Of all weights.
        batch_size: Samples a step, at most: they are cut into equal batches.
        augment: Of the samples, a name of `smi.models.classifiers.AUGMENTATIONS`.
    """

    epochs: int = 100
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    augment: str = "crop"

    def __post_init__(self) -> None:
        for rate in ("lr", "weight_decay"):
            check_number(rate, getattr(self, rate), low=0)
        check_number("momentum", self.momentum, low=0, high=1)
        check_number("epochs", self.epochs, low=1, integer=True)
        check_number("batch_size", self.batch_size, low=2, integer=True)
        if self.augment not in AUGMENTATIONS:
            raise InputError(f"augment is {self.augment!r}. Allowed: {', '.join(AUGMENTATIONS)}.")

    def _train(
        self,
        model: nn.Module,
        samples: Samples,
        loss: StepLoss,
        job: Job,
        *,
        name: str = "training",
        epochs: int | None = None,
        curves: Mapping[str, list[float]] | None = None,
    ) -> list[float]:
        """Train ``model`` in place, as `trainable` gives it.

        Args:
            model: It says where; the samples stay on the CPU, a step's go there.
            samples: With labels.
            loss: Of a step: ``loss(run, images, labels)``, differentiable.
            job: Its seed gives the order of the samples and the augmentation; the loop goes on from its state.
            name: Of the loop, where a defense has more than one.
            epochs: Where there are to be others than `epochs`.
            curves: What ``loss`` appends to, by name.

        Returns:
            The mean loss of each epoch.
        """
        epochs, steps = epochs or self.epochs, math.ceil(len(samples) / self.batch_size)
        optimizer = torch.optim.SGD(model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay)
        rng, augment, device, curve = job.rng("repair"), AUGMENTATIONS[self.augment], device_of(model), list[float]()

        def one_epoch(index: int) -> None:
            total = 0.0
            with fast(model) as run:
                batches = torch.randperm(len(samples), generator=rng).tensor_split(steps)
                for number, batch in enumerate(batches, index * steps):
                    for group in optimizer.param_groups:
                        group["lr"] = self.lr * (1 + math.cos(math.pi * number / (epochs * steps))) / 2
                    value = loss(run, augment(samples.images[batch], rng).to(device), samples.labels[batch].to(device))
                    optimizer.zero_grad()
                    value.backward()
                    optimizer.step()
                    total += value.item()
            curve.append(total / steps)

        loop = Loop(
            name=name, rounds=epochs, trained=model.state_dict(), optimizer=optimizer, generators=[rng],
            curves={"loss": curve} | dict(curves or {}),
        )  # fmt: skip
        loop.run(job, one_epoch, partial(job.on_round, model))
        return curve
