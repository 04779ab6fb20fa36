"""Fine-Pruning (Liu, Dolan-Gavitt, Garg, RAID 2018).

The paper is "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks".

A backdoor lives in channels that clean images leave dormant. With ``a_c = E_x mean_{h,w} max(0, F_c(x))`` of the last
convolution, channels are pruned in the order of rising ``a_c``, and the rest is fine-tuned on the samples.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from smi.defenses.base import Defense, Repair, defenses
from smi.defenses.channels import Layer, activity, agreement, conv_layers, prune, split
from smi.defenses.distillation import Distillation
from smi.defenses.training import Schedule, train_repair
from smi.domains.base import PublicImages, Samples
from smi.runtime.checks import check_number
from smi.runtime.compute import Runner, predict, unfrozen
from smi.runtime.job import Job


@defenses.register("fp")
@dataclass(frozen=True, kw_only=True)
class FinePrune(Defense):
    """Prune the dormant channels of the last convolution, then fine-tune; what is pruned stays zero.

    The paper prunes until clean accuracy falls. Here as many channels go as leave the pruned model agreeing with the
    suspect model on all but a share ``tolerance`` of the held-out samples; that count is found by bisection, which
    takes agreement to fall as more is pruned.

    Attributes:
        schedule: Of the fine-tuning, which uses all samples. It is that of `FineTune`, not the paper's.
        tolerance: Share of the held-out samples, in [0, 1], on which the two may disagree.
        held_out: Share of the samples, in (0, 1), that is held out to find the count.
    """

    schedule: Schedule = field(default_factory=Schedule)
    tolerance: float = 0.02
    held_out: float = 0.3

    name = "fp"

    def __post_init__(self) -> None:
        check_number("tolerance", self.tolerance, low=0, high=1)
        check_number("held_out", self.held_out, low=0.01, high=0.99)

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, job: Job) -> Repair:
        layer = conv_layers(model, samples.images)[-1]
        fit, held = split(samples, self.held_out, job.seed)
        order = activity(model, layer, fit.images).argsort(stable=True)
        count, agreed = self._how_many(model, layer, order, held.images)
        dormant = order[:count]
        pruned = unfrozen(model)
        prune(pruned, layer, dormant)
        rng = job.rng("distil")
        distil = Distillation(model, public, rng)

        def loss(run: Runner, images: Tensor, labels: Tensor) -> Tensor:
            value = F.cross_entropy(run(images), labels)
            return value + self.schedule.distill * distil(run, images) if self.schedule.distill else value

        repaired, curve = train_repair(
            pruned, samples, self.schedule, loss, job,
            after_step=lambda trained: prune(trained, layer, dormant), moving=[rng],
        )  # fmt: skip
        log = {"loss": curve, "pruned": {layer.output: sorted(dormant.tolist())}, "agreement": agreed}
        return Repair(repaired, self.name, samples.source, self.settings(), log)

    def _how_many(self, model: nn.Module, layer: Layer, order: Tensor, images: Tensor) -> tuple[int, float]:
        """How many channels of ``order`` can go, one at least left, and the agreement that is left then."""
        labels = predict(model, images).argmax(1)

        def after(count: int) -> float:
            trial = copy.deepcopy(model)
            prune(trial, layer, order[:count])
            return agreement(trial, labels, images)

        good, bad, agreed = 0, len(order), 1.0
        while bad - good > 1:
            middle = (good + bad) // 2
            found = after(middle)
            if found >= 1 - self.tolerance:
                good, agreed = middle, found
            else:
                bad = middle
        return good, agreed
