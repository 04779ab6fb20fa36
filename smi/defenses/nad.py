"""Neural Attention Distillation (Li et al., ICLR 2021).

The paper is "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks".

    min_θ  E CE(f_θ(x), y) + Σ_l β_l mean_p (A_l(teacher)_p / ‖A_l(teacher)‖₂ − A_l(f_θ)_p / ‖A_l(f_θ)‖₂)²,
    A_l = Σ_c |F_{l,c}|^p

The teacher is the suspect model fine-tuned on the samples, the student starts as the suspect model, F_l are the feature
maps of a few layers, and the mean is over their pixels. So it is in the authors' code; the paper writes the norm of the
difference.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.defenses.base import Repair, defenses
from smi.defenses.channels import CONVOLUTIONS, watch
from smi.defenses.sgd import Tuned, trainable
from smi.domains.base import PublicImages, Samples
from smi.errors import InputError
from smi.runtime.checks import check_number, device_of, evaluating
from smi.runtime.compute import Runner, fast, frozen
from smi.runtime.job import Job


@defenses.register("nad")
@dataclass(frozen=True, kw_only=True)
class NAD(Tuned):
    """Neural attention distillation, with the settings of BackdoorBench for CIFAR-10 (Wu et al., NeurIPS 2022).

    SGD with a cosine decay; every BatchNorm normalises by the batch and learns its statistics. Public images are not
    used. Two details differ: images are shifted but not mirrored, because a mirrored digit or traffic sign is another
    one or none (``augment="crop_flip"`` does), and dropout stays off. The authors' own code takes 20 epochs at 0.1 and
    then 0.01 and a β of 5,000 on the last layer alone, for 2,500 samples: with 300 it wrecks a small model.

    Attributes:
        betas: β of the last layers of `attention_layers`, the last one last. Of a model with fewer, the last ones
            count.
        power: p.
        teacher_epochs: Of the teacher, by the same recipe without attention.
    """

    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    power: float = 2.0
    teacher_epochs: int = 10
    weight_decay: float = 1e-4

    name = "nad"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.betas:
            raise InputError("betas is empty. Give a weight for the last layer at least, such as (1000.0,).")
        for beta in self.betas:
            check_number("betas", beta, low=0)
        check_number("power", self.power, low=1)
        check_number("teacher_epochs", self.teacher_epochs, low=1, integer=True)

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, job: Job) -> Repair:
        names = attention_layers(model, samples.images)[-len(self.betas) :]
        betas = dict(zip(names, self.betas[-len(names) :], strict=True))
        teacher, _ = trainable(model)
        own = replace(job, seed=job.derive("teacher"))
        first = self._train(teacher, samples, _plain, own, name="teacher", epochs=self.teacher_epochs)
        teacher = frozen(teacher)
        student, _ = trainable(model)
        taught: dict[str, Tensor] = {}
        learned: dict[str, Tensor] = {}
        distances: list[float] = []

        def loss(run: Runner, images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad(), fast(teacher) as teach:
                teach(images)
            value = F.cross_entropy(run(images), labels)
            gaps = {name: attention_distance(learned[name], taught[name], self.power) for name in names}
            distances.append(sum(gap.item() for gap in gaps.values()))
            return value + torch.stack([betas[name] * gap for name, gap in gaps.items()]).sum()

        with watch(teacher, names, taught), watch(student, names, learned):
            curve = self._train(student, samples, loss, job, curves={"attention": distances})
        log = {"loss": curve, "teacher_loss": first, "layers": names, "attention": distances}
        return Repair(student.eval(), self.name, samples.source, self.settings(), log)


def _plain(run: Runner, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(run(images), labels)


def attention_distance(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    """Mean square difference of two attention maps of unit norm; features ``[N, C, H, W]`` in, a scalar out."""
    a, b = (F.normalize(x.float().abs().pow(power).sum(1).flatten(1), dim=1) for x in (student, teacher))
    return F.mse_loss(a, b)


def attention_layers(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the modules whose feature maps are compared: of each size of map, larger than one pixel, the last.

    That is the last activation before each down-sampling and before the pooling at the end, or the last residual block
    of a stage.

    Args:
        model: Images to logits.
        images: ``[N, C, H, W]`` in [0, 1], one of which is run.
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
