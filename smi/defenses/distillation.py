"""Distillation: a repaired model is held to what the suspect says of samples and public images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.domains.augment import jitter
from smi.domains.base import PublicImages
from smi.runtime.compute import Runner, fast, predict
from smi.runtime.memory import Chunk, halving

SURE = 0.5  # mean top probability from which public images say something about the suspect's clean behaviour


def confident_public(model: nn.Module, public: PublicImages | None) -> PublicImages | None:
    """``public``, or None where the model recognises so little in it that holding its answers would hold a backdoor.

    That is where the mean probability of its top class is below `SURE`: its answers to such images are spread over many
    classes, each change of the weights moves them, and a removal that keeps them keeps all else as well. Seen on a
    43-class traffic sign model and photographs of other things (mean 0.4, digits beside digits 0.9). At most some
    thousand of the images are asked.
    """
    if public is None:
        return None
    asked = public.images[:: max(1, len(public) // 1000)]
    top = predict(model, asked).softmax(1).amax(1).mean().item()
    return public if top >= SURE else None


class Distillation:
    """``KL(suspect ‖ repaired)`` on samples and public images: what stands for accuracy where nobody has clean data.

    Both are varied by small affine maps and gammas, afresh each step. Public images count where the suspect has
    `confident_public` them. The suspect is `frozen`.
    """

    def __init__(self, model: nn.Module, public: PublicImages | None, rng: torch.Generator) -> None:
        self._teacher = model
        self._public, self._rng = confident_public(self._teacher, public), rng

    def __call__(self, run: Runner, images: Tensor) -> Tensor:
        """Scalar loss on ``images`` ``[N, C, H, W]`` and as many public ones."""
        if self._public is not None:
            extra = self._public.images[torch.randint(len(self._public), (len(images),), generator=self._rng)]
            images = torch.cat([images, extra.to(images.device)])
        images = jitter(images, self._rng)
        wanted = F.log_softmax(teacher_logits(self._teacher, images), 1)
        return F.kl_div(F.log_softmax(run(images), 1), wanted, reduction="batchmean", log_target=True)


@torch.no_grad()
def teacher_logits(teacher: nn.Module, images: Tensor) -> Tensor:
    """What a frozen model says of images: logits float32, the quick way, without a gradient."""
    with fast(teacher) as run:
        return torch.cat(list(halving(run, images, Chunk(len(images)))))
