"""Fine-tuning: train on with the samples. The simplest removal, and often none at all."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from smi.defenses.base import Defense, Repair, defenses
from smi.defenses.distillation import Distillation
from smi.defenses.training import Schedule, train_repair
from smi.domains.base import PublicImages, Samples
from smi.runtime.compute import Runner
from smi.runtime.job import Job


@defenses.register("ft")
@dataclass(frozen=True, kw_only=True)
class FineTune(Defense):
    """Minimise cross-entropy on the samples; with ``schedule.distill`` also stay close to the suspect's outputs.

    By AdamW on the samples as they are, BatchNorm in eval mode. What papers call fine-tuning is another recipe, that of
    `FTSAM` with a ρ of 0.
    """

    schedule: Schedule = field(default_factory=Schedule)

    name = "ft"

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, job: Job) -> Repair:
        rng = job.rng("distil")
        distil = Distillation(model, public, rng)

        def loss(run: Runner, images: Tensor, labels: Tensor) -> Tensor:
            value = F.cross_entropy(run(images), labels)
            return value + self.schedule.distill * distil(run, images) if self.schedule.distill else value

        repaired, curve = train_repair(model, samples, self.schedule, loss, job, moving=[rng])
        return Repair(repaired, self.name, samples.source, self.settings(), {"loss": curve})
