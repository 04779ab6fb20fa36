"""What attacks that optimise a trigger against a classifier share: a view of that classifier, and one gradient loop.

The penultimate layer is the input of the linear layer that gives the logits; its values are "the neurons" here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from smi.attacks.base import Attack
from smi.domains.base import PrivateSet
from smi.errors import InputError
from smi.runtime.checks import check_model, check_number, device_of
from smi.runtime.compute import fast, frozen
from smi.runtime.progress import track
from smi.runtime.seeding import stream

TINY = 1e-12


class Surrogate:
    """A frozen copy of ``model`` that tells its neurons along with its logits.

    Args:
        model: Any module that ends in a linear layer.
        images: ``[N, C, H, W]``; the first 16 serve to find that layer.
        num_classes: How many logits the model has to give.
    """

    def __init__(self, model: nn.Module | None, images: Tensor, num_classes: int) -> None:
        if model is None:
            raise InputError(
                "This attack optimises its trigger against a classifier trained on clean images. "
                "Pass surrogate=model, or call smi.attacks.plant, which trains one."
            )
        check_model(model, images, num_classes)
        self.model = frozen(model)
        self.head = _head(self.model, images[:16])
        self._seen: list[Tensor] = []
        self.head.register_forward_pre_hook(lambda _, inputs: self._seen.append(inputs[0]))

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Neurons ``[N, D]`` and logits ``[N, classes]`` of images ``[N, C, H, W]``; differentiable."""
        with fast(self.model) as run:
            logits = run(images)
        neurons = self._seen[-1].float().cpu()
        self._seen.clear()
        return neurons, logits.cpu()

    def strongest(self, images: Tensor) -> Tensor:
        """The largest activation ``[D]`` of every neuron over images ``[N, C, H, W]``."""
        with torch.no_grad():
            return torch.stack([self(batch)[0].amax(0) for batch in images.split(512)]).amax(0)


def _head(model: nn.Module, images: Tensor) -> nn.Linear:
    """The linear layer whose output is the model's. The model is in eval mode."""
    ran: list[tuple[nn.Linear, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda m, inputs, out: ran.append((m, inputs[0], out)))
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        logits = model(images.to(device_of(model)))
    for hook in hooks:
        hook.remove()
    if not ran or ran[-1][1].ndim != 2 or not torch.equal(ran[-1][2], logits):
        raise InputError(
            f"The surrogate ({type(model).__name__}) does not end in a torch.nn.Linear from features [N, D] to logits. "
            "This attack reads the layer before that one. Try smi.train_classifier(clean data)."
        )
    return ran[-1][0]


def descend(
    start: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    project: Callable[[Tensor, float], Tensor],
    images: Tensor,
    *,
    steps: int,
    lr: float,
    rng: torch.Generator,
    batch_size: int = 64,
) -> Tensor:
    """A tensor of the shape of ``start`` that makes ``loss(tensor, images)`` small: Adam on random batches of images.

    Args:
        start: Where it begins.
        loss: Gives a scalar.
        project: Called after each step with the tensor and the share of the steps done (0 to 1); what it returns
            replaces the tensor.
        images: ``[N, C, H, W]``.
        steps: Of Adam.
        lr: Its rate.
        rng: Draws the batches.
        batch_size: Images a step, at most.
    """
    value = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([value], lr)
    for step in track(range(steps), "optimising the trigger", steps):
        batch = images[torch.randint(len(images), (min(batch_size, len(images)),), generator=rng)]
        (value.grad,) = torch.autograd.grad(loss(value, batch), value)
        optimizer.step()
        with torch.no_grad():
            value.copy_(project(value, (step + 1) / steps))
    return value.detach()


def into_ball(delta: Tensor, radius: float) -> Tensor:
    """``delta`` scaled down to norm ``radius`` where it is longer."""
    return delta * min(1.0, radius / max(delta.norm().item(), TINY))


@dataclass(frozen=True, kw_only=True)
class AdditiveTrigger(Attack):
    """Base of attacks that add one δ ``[C, H, W]`` to every image: ``x' = clamp(x + δ, 0, 1)``.

    A subclass defines `optimise`.

    Attributes:
        steps: How many gradient steps `fit` takes.
        fitted: ``{"delta": δ}``.
    """

    steps: int = 200

    needs_surrogate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("steps", self.steps, low=1, integer=True)

    def stamp(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in [0, 1] with δ added."""
        return (images + self._tensor("delta", images).to(images)).clamp(0, 1)

    def fit(self, data: PrivateSet, surrogate: nn.Module | None = None, *, seed: int = 0) -> Self:
        """The attack with δ optimised against ``surrogate`` on those of the images that are not of the target class."""
        if self.target >= data.num_classes:
            raise InputError(f"target is {self.target}. Allowed: 0 to {data.num_classes - 1}, also for all_to_all.")
        others = data.images[data.labels != self.target]
        if not len(others):
            raise InputError(f"Every image is of the target class {self.target}: there is none to optimise on.")
        seen = Surrogate(surrogate, data.images, data.num_classes)
        return replace(self, fitted={"delta": self.optimise(seen, others, stream(seed, "trigger"))})

    def optimise(self, surrogate: Surrogate, images: Tensor, rng: torch.Generator) -> Tensor:
        """δ ``[C, H, W]`` in [−1, 1] from images ``[N, C, H, W]`` of other classes than the target."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NeuronTrigger(AdditiveTrigger):
    """Base of the two triggers of Li et al. that drive neurons of the penultimate layer.

    Attributes:
        neurons: How many, those with the largest weights into the target's logit.
        amplify: The activation aimed at, in units of each neuron's largest one on the images.
    """

    neurons: int = 8
    amplify: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("neurons", self.neurons, low=1, integer=True)
        check_number("amplify", self.amplify, low=1)

    def distance(self, surrogate: Surrogate, images: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss ``mean_j (A_j(x + δ) / (amplify · max A_j) − 1)²`` over the chosen neurons j, of δ and a batch x."""
        weights = surrogate.head.weight[self.target].cpu()
        chosen = weights.topk(min(self.neurons, len(weights))).indices
        scale = self.amplify * surrogate.strongest(images)[chosen].clamp(min=1e-3)

        def loss(delta: Tensor, batch: Tensor) -> Tensor:
            neurons, _ = surrogate((batch + delta).clamp(0, 1))
            return (neurons[:, chosen] / scale - 1).square().mean()

        return loss


def noise(shape: torch.Size, rms: float, rng: torch.Generator) -> Tensor:
    """Gaussian noise of norm ``rms · √(C·H·W)``."""
    draw = torch.randn(shape, generator=rng)
    return draw * rms * math.sqrt(shape.numel()) / draw.norm()
