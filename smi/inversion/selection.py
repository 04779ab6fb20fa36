"""Selection: of many candidates keep the most stable ones of each class that are not near-copies of each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smi.domains.base import Samples
from smi.errors import InputError
from smi.runtime.checks import check_number, device_of, evaluating
from smi.runtime.compute import predict
from smi.runtime.memory import Chunk, halving
from smi.runtime.precision import asked_precision
from smi.runtime.threads import suited
from smi_kernels import stability_scores, which_backend


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How candidates are scored and kept.

    Attributes:
        oversample: Candidates made per image kept.
        k: Draws of noise of the stability score, see `smi_kernels.stability_scores`.
        sigma_x: Its noise on pixels.
        sigma_w: Its noise on weights, relative to them.
        divergence: How it compares predictions.
        diversity: A candidate nearer to one that is kept than this quantile of the class's pairwise feature distances
            is passed over while others are left; 0 keeps the most stable, however alike.
    """

    oversample: int = 3
    k: int = 16
    sigma_x: float = 0.03
    sigma_w: float = 0.05
    divergence: str = "kl"
    diversity: float = 0.05

    def __post_init__(self) -> None:
        check_number("oversample", self.oversample, low=1, integer=True)
        check_number("k", self.k, low=1, integer=True)
        check_number("sigma_x", self.sigma_x, low=0)
        check_number("sigma_w", self.sigma_w, low=0)
        check_number("diversity", self.diversity, low=0, high=1)


def score_samples(model: nn.Module, samples: Samples, selection: Selection = Selection(), *, seed: int = 0) -> Tensor:
    """Stability scores float32 ``[N]`` of samples on ``model``, in eval mode. Lower is more stable."""
    with evaluating(model), suited(model):
        device, options = device_of(model), _options(selection)

        def of(chunk: Tensor) -> Tensor:
            images, labels = samples.images[chunk].to(device), samples.labels[chunk].to(device)
            return stability_scores(model, images, labels, **options, seed=seed).cpu()

        return torch.cat(list(halving(of, torch.arange(len(samples)), Chunk(len(samples)))))


def kernel_backend(model: nn.Module, images: Tensor, labels: Tensor, selection: Selection = Selection()) -> str:
    """Name of the backend of `smi_kernels` that scores samples such as these, for records."""
    with evaluating(model):
        device = device_of(model)
        return which_backend(model, images.to(device), labels.to(device), **_options(selection))


def _options(selection: Selection) -> dict[str, Any]:
    return {
        "k": selection.k,
        "sigma_x": selection.sigma_x,
        "sigma_w": selection.sigma_w,
        "divergence": selection.divergence,
        "dtype": asked_precision(),
    }


def select_stable(
    model: nn.Module,
    candidates: Samples,
    per_class: int,
    selection: Selection = Selection(),
    *,
    seed: int = 0,
) -> Samples:
    """Keep ``per_class`` candidates of every class, most stable first, subject to diversity.

    Candidates that the model itself does not take for their class come last.

    Args:
        model: The suspect.
        candidates: At least ``per_class`` of every class.
        per_class: How many are kept.
        selection: How they are scored and kept. Default: `Selection`.
        seed: Of the noise.

    Returns:
        `Samples` with their scores.

    Raises:
        InputError: Where a class has too few candidates.

    >>> import smi
    >>> suspect, prior = smi.load_classifier("digits-badnets"), smi.load_prior("digits")
    >>> candidates = smi.invert(suspect, prior, smi.Latent(steps=1), per_class=4)
    >>> select_stable(suspect, candidates, per_class=2)
    Samples(20 latent images of 10 classes, (1, 32, 32))
    """
    classes = range(candidates.num_classes)
    index, scores = most_stable(model, candidates, per_class, selection, classes, seed=seed)
    chosen = candidates.select(index)
    return Samples(chosen.images, chosen.labels, chosen.num_classes, chosen.source, scores)


def most_stable(
    model: nn.Module,
    candidates: Samples,
    per_class: int,
    selection: Selection,
    classes: Iterable[int],
    *,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Positions ``[N]`` of what `select_stable` keeps of these classes, class by class, and their scores."""
    scores = score_samples(model, candidates, selection, seed=seed)
    wrong = predict(model, candidates.images).argmax(1) != candidates.labels
    rank = scores + wrong * (scores.max() - scores.min() + 1)
    embedded = features(model, candidates.images)
    kept = []
    for label in classes:
        of_class = (candidates.labels == label).nonzero()[:, 0]
        if len(of_class) < per_class:
            raise InputError(f"Class {label} has {len(of_class)} candidates; {per_class} are to be kept. Make more.")
        order = of_class[rank[of_class].argsort(stable=True)]
        kept.append(order[_spread(embedded[order], per_class, selection.diversity)])
    index = torch.cat(kept)
    return index, scores[index]


def features(model: nn.Module, images: Tensor, *, batch_size: int = 512) -> Tensor:
    """What the model's last linear layer sees ``[N, features]``, float32; the logits where there is no linear layer."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linear:
        return predict(model, images, batch_size=batch_size)
    seen: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().float().cpu().flatten(1)))
    try:
        with evaluating(model), torch.no_grad():
            for batch in images.split(batch_size):
                model(batch.to(device_of(model)))
    finally:
        hook.remove()
    return torch.cat(seen)


def _spread(points: Tensor, count: int, quantile: float) -> Tensor:
    """Positions of ``count`` points, in order, passing over those too near to one taken; filled up in order."""
    distance = torch.cdist(points, points)
    pairs = distance[torch.triu_indices(len(points), len(points), 1).unbind()]
    limit = pairs.quantile(quantile) if quantile and len(pairs) else torch.tensor(-1.0)  # below any distance
    taken: list[int] = []
    for i in range(len(points)):
        if len(taken) < count and (not taken or distance[i, taken].min() > limit):
            taken.append(i)
    passed_over = [i for i in range(len(points)) if i not in set(taken)]
    return torch.tensor((taken + passed_over)[:count])
