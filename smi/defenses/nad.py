"""Neural Attention Distillation (Li et al., "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural
Networks", ICLR 2021).

    min_θ  E CE(f_θ(x), y) + β Σ_l ‖ A_l(teacher) / ‖A_l(teacher)‖₂ − A_l(f_θ) / ‖A_l(f_θ)‖₂ ‖₂,   A_l = Σ_c |F_{l,c}|^p

The teacher is the suspect model fine-tuned on the samples, the student starts as the suspect model, and F_l are the
feature maps of a few layers.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.checks import check_number, device_of, evaluating
from smi.compute import Runner, fast, frozen
from smi.defenses.base import Defense, Distillation, Repair, Schedule, defenses, train_repair
from smi.defenses.channels import CONVOLUTIONS, watch
from smi.defenses.finetune import FineTune
from smi.domains.base import PublicImages, Samples
from smi.errors import InputError
from smi.seeding import derive, stream


@defenses.register("nad")
@dataclass(frozen=True, kw_only=True)
class NAD(Defense):
    """Neural attention distillation. beta: β. power: p. The layers are those of `attention_layers`.

    The attention distance is that of the formula, one of unit vectors, a mean over the images, and lies in [0, √2] a
    layer. Teacher and student are trained with the same schedule. The schedule, β and the layers are this project's:
    AdamW on the samples as they are, BatchNorm in eval mode. The authors' code trains by SGD at a rate of 0.1 for 20
    epochs, BatchNorm in train mode, on cropped and mirrored images, and takes the mean squared difference of the maps
    of one to three stages, with weights in the thousands.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(lr=2e-3))
    beta: float = 10.0
    power: float = 2.0

    name = "nad"

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0)
        check_number("power", self.power, low=1)

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, seed: int) -> Repair:
        names = attention_layers(model, samples.images)
        tuned = FineTune(schedule=self.schedule).repair(model, samples, public, seed=derive(seed, "teacher"))
        teacher, distil = frozen(tuned.model), Distillation(model, public, stream(seed, "distil"))
        taught: dict[str, Tensor] = {}
        learned: dict[str, Tensor] = {}
        distances: list[float] = []

        def loss(run: Runner, images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad(), fast(teacher) as teach:
                teach(images)
            value = F.cross_entropy(run(images), labels)
            gaps = [attention_distance(learned[name], taught[name], self.power) for name in names]
            distances.append(sum(gap.item() for gap in gaps))
            value = value + self.beta * torch.stack(gaps).sum()
            return value + self.schedule.distill * distil(run, images) if self.schedule.distill else value

        with ExitStack() as hooks:

            def before_round(student: nn.Module, index: int) -> None:
                if index == 0:  # the loop trains a copy of its own, which is first seen here
                    hooks.enter_context(watch(student, names, learned))

            hooks.enter_context(watch(teacher, names, taught))
            repaired, curve = train_repair(model, samples, self.schedule, loss, seed=seed, before_round=before_round)
        log = {"loss": curve, "teacher_loss": tuned.log["loss"], "layers": names, "attention": distances}
        return Repair(repaired, self.name, samples.source, self.settings(), log)


def attention_distance(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    """Mean over the images of the distance of two attention maps; features ``[N, C, H, W]`` in, a scalar out."""
    a, b = (F.normalize(x.float().abs().pow(power).sum(1).flatten(1), dim=1) for x in (student, teacher))
    return ((a - b).square().sum(1) + 1e-12).sqrt().mean()  # where the maps are equal the root has no gradient


def attention_layers(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the modules whose feature maps are compared: of each size of map, larger than one pixel, the last.

    That is the last activation before each down-sampling and before the pooling at the end, or the last residual block
    of a stage. images: ``[N, C, H, W]`` in [0, 1], one of which is run.
    """
    last: dict[tuple[int, ...], str] = {}
    names, begun = {m: name for name, m in model.named_modules() if m is not model}, []

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, CONVOLUTIONS):
            begun.append(module)  # what comes before the first convolution is the image, not a feature map
        if begun and isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
            last[tuple(output.shape[2:])] = names[module]

    with ExitStack() as hooks, evaluating(model), torch.no_grad():
        for module in names:
            hooks.callback(module.register_forward_hook(see).remove)
        model(images[:1].to(device_of(model)))
    if not last:
        raise InputError("The model has no feature maps [N, C, H, W] after a convolution. Use another defense.")
    return list(last.values())
