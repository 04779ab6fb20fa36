"""Fine-tuning as papers run it: SGD on augmented samples, every BatchNorm normalising by the batch.

The project's own loop (`smi.defenses.base.train_repair`) is another recipe: AdamW on the samples as they are, with the
statistics that BatchNorm has. Dropout stays off in both.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from smi.checks import device_of
from smi.classifiers import AUGMENTATIONS
from smi.compute import fast
from smi.defenses.base import StepLoss, follower
from smi.defenses.channels import NORMS
from smi.domains.base import Samples
from smi.seeding import stream


def trainable(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """A copy to train, and its BatchNorm layers, which are in train mode; the rest is in eval mode."""
    copied = copy.deepcopy(model).eval().requires_grad_(True)
    return copied, [module.train() for module in copied.modules() if isinstance(module, NORMS)]


def train(
    model: nn.Module,
    samples: Samples,
    optimizer: torch.optim.Optimizer,
    loss: StepLoss,
    *,
    epochs: int,
    batch_size: int,
    augment: str,
    seed: int,
) -> list[float]:
    """Train ``model`` in place.

    Args:
        model: As `trainable` gives it.
        samples: They stay on the CPU; a step's go to where the model is.
        optimizer: Of the model's parameters. Its rate falls along one cosine.
        loss: Of a step: ``loss(run, images, labels)``, differentiable.
        epochs: Passes over the samples.
        batch_size: Samples a step, at most: they are cut into equal batches.
        augment: A name of `smi.classifiers.AUGMENTATIONS`.
        seed: Of the order of the samples and of the augmentation.

    Returns:
        The mean loss of each epoch.
    """
    device, steps = device_of(model), math.ceil(len(samples) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    rng, vary, follow = stream(seed, "repair"), AUGMENTATIONS[augment], follower()
    curve: list[float] = []
    follow(model, 0)
    with fast(model) as run:
        for epoch in range(epochs):
            total = 0.0
            for batch in torch.randperm(len(samples), generator=rng).tensor_split(steps):
                value = loss(run, vary(samples.images[batch], rng).to(device), samples.labels[batch].to(device))
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
                total += value.item()
            curve.append(total / steps)
            follow(model, epoch + 1)
    return curve
