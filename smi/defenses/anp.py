"""Adversarial Neuron Pruning (Wu & Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", NeurIPS 2021).

    min_{m ∈ [0,1]}  α L(m) + (1 − α) max_{δ,ξ ∈ [−ε,ε]} L(m, δ, ξ)

where channel c's BatchNorm has the weight ``(m_c + δ_c) γ_c`` and the bias ``(1 + ξ_c) β_c``, and L is cross-entropy on
the samples. A backdoor's channels answer to a small perturbation as they do to the trigger, so that their masks m fall;
channels with a small mask are pruned (``m = 0``; as in the paper, the bias stays).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.defenses.base import Defense, Repair, defenses
from smi.defenses.channels import NORMS, Layer, agreement, conv_layers, pruned_share, split
from smi.defenses.distillation import Distillation
from smi.defenses.training import Schedule
from smi.domains.base import PublicImages, Samples
from smi.errors import InputError
from smi.runtime.checks import check_number, device_of
from smi.runtime.compute import Runner, fast, frozen, predict, unfrozen
from smi.runtime.job import Job, Loop

THRESHOLDS = [round(0.05 * k, 2) for k in range(20)]  # of the mask, as in the paper
Masks = dict[str, Tensor]


@defenses.register("anp")
@dataclass(frozen=True, kw_only=True)
class ANP(Defense):
    """Adversarial neuron pruning: BatchNorm channels are pruned, no weight is trained.

    The paper picks the threshold by test accuracy. Here it is the largest at which the pruned model agrees with the
    suspect model on all but a share ``tolerance`` of the samples held out of the optimisation. The authors take 2,000
    steps of 128 cropped and mirrored images; here it is 200 passes over the samples as they are, 400 steps where there
    are 300. While masks are found, every BatchNorm normalises by the batch, as in the authors' code: that takes a
    perturbation out again downstream, without which the paper's ε wrecks a small model.

    Attributes:
        schedule: As in the paper, masks are found by SGD with momentum 0.9 at the constant rate ``lr``. Weight decay is
            not applied.
        epsilon: ε, relative to weight and bias.
        alpha: α in [0, 1].
        steps: Signed ascent steps for δ and ξ, from noise.
        tolerance: Share of the held-out samples, in [0, 1], on which the two may disagree.
        held_out: Share of the samples, in (0, 1), that is held out.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(rounds=200, lr=0.2, weight_decay=0.0))
    epsilon: float = 0.4
    alpha: float = 0.2
    steps: int = 1
    tolerance: float = 0.05
    held_out: float = 0.3

    name = "anp"

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, low=0)
        check_number("alpha", self.alpha, low=0, high=1)
        check_number("steps", self.steps, low=1, integer=True)
        check_number("tolerance", self.tolerance, low=0, high=1)
        check_number("held_out", self.held_out, low=0.01, high=0.99)

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, job: Job) -> Repair:
        layers = [layer for layer in conv_layers(model, samples.images) if _affine(model, layer)]
        if not layers:
            raise InputError(
                "ANP prunes by the weights of BatchNorm, and no convolution of this model is followed by a BatchNorm "
                "with weights. Use a model with BatchNorm, or another defense."
            )
        fit, held = split(samples, self.held_out, job.seed)
        masks, curve = self._masks(model, layers, fit, public, job)
        threshold, agreed = self._threshold(model, masks, held.images)
        pruned = {name: (mask <= threshold).nonzero()[:, 0].tolist() for name, mask in masks.items()}
        log = {
            "loss": curve,
            "masks": {name: mask.tolist() for name, mask in masks.items()},
            "threshold": threshold,
            "agreement": agreed,
            "pruned": pruned,
            "pruned_share": pruned_share(pruned, layers),
        }
        return Repair(_without(model, masks, threshold), self.name, samples.source, self.settings(), log)

    def _masks(
        self, model: nn.Module, layers: list[Layer], samples: Samples, public: PublicImages | None, job: Job
    ) -> tuple[Masks, list[float]]:
        """The masks by BatchNorm, each ``[channels]`` in [0, 1], and the mean loss of each round."""
        rng, order, other = job.rng("noise"), job.rng("repair"), job.rng("distil")
        distil, still = Distillation(model, public, other), _batch_statistics(frozen(model))
        names, device = [layer.output for layer in layers], device_of(model)
        given = {k: v for k, v in still.named_parameters() if k.rpartition(".")[0] in names}
        masks = {n: torch.ones_like(given[f"{n}.weight"], requires_grad=True) for n in names}
        optimizer = torch.optim.SGD(masks.values(), self.schedule.lr, momentum=0.9)
        count, curve = max(1, len(samples) // self.schedule.batch_size), list[float]()

        def one_round(index: int) -> None:
            total = 0.0
            with fast(still) as run:
                for batch in torch.randperm(len(samples), generator=order).tensor_split(count):
                    images, labels = samples.images[batch].to(device), samples.labels[batch].to(device)
                    value = self._loss(run, given, masks, images, labels, rng)
                    if self.schedule.distill:
                        plain = _perturbed(given, masks, {})
                        value = value + self.schedule.distill * distil(lambda x, _=None, p=plain: run(x, p), images)
                    optimizer.zero_grad()
                    value.backward()
                    optimizer.step()
                    with torch.no_grad():
                        for mask in masks.values():
                            mask.clamp_(0, 1)
                    total += value.item()
            curve.append(total / count)

        loop = Loop(
            name="masks", rounds=self.schedule.rounds, trained=masks, optimizer=optimizer,
            generators=[rng, order, other], curves={"loss": curve},
        )  # fmt: skip
        loop.run(job, one_round)
        return {n: mask.detach() for n, mask in masks.items()}, curve

    def _loss(
        self,
        run: Runner,
        given: Mapping[str, Tensor],
        masks: Masks,
        images: Tensor,
        labels: Tensor,
        rng: torch.Generator,
    ) -> Tensor:
        noise = {k: (2 * torch.rand(v.shape, generator=rng).to(v) - 1) * self.epsilon for k, v in given.items()}
        for _ in range(self.steps):
            shifts = {k: v.requires_grad_() for k, v in noise.items()}
            still = {n: mask.detach() for n, mask in masks.items()}
            loss = F.cross_entropy(run(images, _perturbed(given, still, shifts)), labels)
            gradients = torch.autograd.grad(loss, list(shifts.values()))
            noise = {
                k: (v.detach() + self.epsilon * g.sign()).clamp(-self.epsilon, self.epsilon)
                for (k, v), g in zip(shifts.items(), gradients, strict=True)
            }
        natural = F.cross_entropy(run(images, _perturbed(given, masks, {})), labels)
        robust = F.cross_entropy(run(images, _perturbed(given, masks, noise)), labels)
        return self.alpha * natural + (1 - self.alpha) * robust

    def _threshold(self, model: nn.Module, masks: Masks, images: Tensor) -> tuple[float, float]:
        """The largest threshold that keeps agreement on ``images``, and that agreement; −1 prunes nothing."""
        labels = predict(model, images).argmax(1)
        for threshold in reversed(THRESHOLDS):
            found = agreement(_without(model, masks, threshold), labels, images)
            if found >= 1 - self.tolerance:
                return threshold, found
        return -1.0, 1.0


def _affine(model: nn.Module, layer: Layer) -> bool:
    return layer.norm is not None and isinstance(model.get_submodule(layer.norm).weight, Tensor)


def _batch_statistics(model: nn.Module) -> nn.Module:
    """Let every BatchNorm normalise by the batch, as in the authors' code, and forget what it remembers. Returns it."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.running_mean = module.running_var = None
            module.track_running_stats = False
    return model


def _perturbed(given: Mapping[str, Tensor], masks: Masks, shifts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights ``(m + δ) γ`` and biases ``(1 + ξ) β`` by name; a shift that is not given is 0."""
    made = {}
    for name, value in given.items():
        layer, _, part = name.rpartition(".")
        factor = masks[layer] if part == "weight" else torch.ones_like(value)
        made[name] = (factor + shifts[name] if name in shifts else factor) * value
    return made


def _without(model: nn.Module, masks: Masks, threshold: float) -> nn.Module:
    """A copy of ``model`` in eval mode without the channels whose mask is ``threshold`` or less."""
    pruned = unfrozen(model)
    with torch.no_grad():
        for name, mask in masks.items():
            weight = pruned.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight[mask <= threshold] = 0
    return pruned
