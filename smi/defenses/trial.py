"""A trial step: the rate at which the first step of a repair still leaves the suspect's answers about as they are.

`bearable` bounds a step by the size of the weights, and that does not tell all models apart. At the rate that it
allows them all, one step against universal δ's, a tenth as long, moved the answers of small CNNs on digits by 0.02 to
0.43 nats and those of a VGG with seven weight layers by 2.5 to 3.2 (development seeds 100 and 101). Three repairs of
that VGG ended at 92, 90 and 78 % accuracy. A longer warm-up for all models is no way out: it kept the VGG as well as
half the rate does, and left more of the backdoor in the small CNNs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.compute import Runner, fast
from smi.memory import Chunk, halving

LENGTH = 0.1  # of the rate: about the first step of the warm-up
SHORTER = 0.8  # the next trial
TRIALS = 20


def tried(model: nn.Module, images: Tensor, labels: Tensor, delta: Tensor, lr: float, limit: float) -> float:
    """``lr``, or as much less as a trial step needs to move the model's answers to ``images`` by at most ``limit``.

    images ``[N, C, H, W]`` and labels ``[N]`` where the model is; delta ``[T, C, H, W]``, the stamps, each on as many
    images. The step is Adam's first one, ``lr * LENGTH`` against the sign of the gradient of the stamped images' loss.
    Answers are moved by ``KL(model ‖ model after the step)`` on the images without a stamp, mean, in nats. The rate is
    not lowered below a hundredth. ``model`` is left as it is.
    """
    stepped = copy.deepcopy(model).eval().requires_grad_(True)
    weights: list[Tensor] = list(stepped.parameters())
    at = [weight.detach().clone() for weight in weights]
    stamped = (images + delta[torch.arange(len(images)) % len(delta)].to(images.device)).clamp(0, 1)
    with fast(stepped) as run:
        before, signs = _answers(run, images), [g.sign() for g in _gradient(run, weights, stamped, labels)]
        for _ in range(TRIALS):
            with torch.no_grad():
                for weight, start, sign in zip(weights, at, signs, strict=True):
                    weight.copy_(start - lr * LENGTH * sign)
            moved = F.kl_div(_answers(run, images), before, reduction="batchmean", log_target=True).item()
            if moved <= limit:
                break
            lr *= SHORTER
    return lr


@torch.no_grad()
def _answers(run: Runner, images: Tensor) -> Tensor:
    return torch.cat(list(halving(lambda some: run(some).log_softmax(1), images, Chunk(len(images)))))


def _gradient(run: Runner, weights: Sequence[Tensor], images: Tensor, labels: Tensor) -> list[Tensor]:
    """Of the loss of all images, in as many pieces as the memory asks for."""

    def of(some: Tensor) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(run(images[some]), labels[some], reduction="sum")
        return torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)

    pieces: Iterator[tuple[Tensor, ...]] = halving(of, torch.arange(len(images)), Chunk(len(images)))
    return [torch.stack(parts).sum(0) for parts in zip(*pieces, strict=True)]
