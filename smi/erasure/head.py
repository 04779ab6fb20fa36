"""The last linear layer: what it is given, and how directions are taken out of it in closed form.

Let f be the layer's input, μ and Σ its mean and covariance over natural images, and the rows of D ``[r, F]`` directions
along which triggers move f. A projection that forgets them is I − Dᵀ A with A Dᵀ = I, and it moves an image by
Dᵀ A (f − μ). Of all such A the one that moves images least is, by the theorem of Gauss and Markov and in every norm,

    A = G⁻¹ D Σ⁻¹,  G = D Σ⁻¹ Dᵀ.

So P = I − Dᵀ G⁻¹ D Σ⁻¹: P d = 0 for each row d, and whatever has D Σ⁻¹ (f − μ) = 0 stays where it is. Natural images
hardly use a trigger's direction, so that A (f − μ) is small on them. Folded into the layer W f + b, f ↦ μ + P (f − μ)
gives another layer of the same shape:

    W′ = W − (W Dᵀ) A,  b′ = b + (W Dᵀ) A μ.

Kin, which erase concepts: Ravfogel et al., "Null It Out", ACL 2020; Belrose et al., "LEACE", NeurIPS 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smi.errors import InputError
from smi.runtime.checks import device_of, evaluating
from smi.runtime.compute import fast
from smi.runtime.memory import Chunk, halving

RIDGE = 3e-2  # of the mean variance, added to Σ
RIDGE_OF_DIRECTIONS = 1e-4  # of the mean diagonal, added to G


@dataclass(frozen=True, eq=False)
class Head:
    """The layer that makes the logits.

    Attributes:
        layer: The layer.
        name: Its name in the model.
        pooled: Whether it is a convolution whose outputs are averaged.
    """

    layer: nn.Linear | nn.Conv2d
    name: str
    pooled: bool = False

    @property
    def weight(self) -> Tensor:
        """``[classes, F]``."""
        return self.layer.weight.flatten(1)


def head_of(model: nn.Module, images: Tensor) -> Head:
    """The last linear layer, or a last 1×1 convolution that is averaged over the image.

    Args:
        model: Images to logits.
        images: ``[N, C, H, W]``, to see which layer's output the logits are.

    Raises:
        InputError: Where they are no such layer's.
    """
    seen: list[tuple[str, nn.Linear | nn.Conv2d, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda layer, _, out, name=name: seen.append((name, layer, out)))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))
    ]
    try:
        with evaluating(model), torch.no_grad():
            logits = model(images.to(device_of(model)))
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer, out in reversed(seen):
        if isinstance(layer, nn.Linear) and out.shape == logits.shape and torch.equal(out, logits):
            return Head(layer, name)
        if isinstance(layer, nn.Conv2d) and _averaged(layer, out, logits):
            return Head(layer, name, pooled=True)
    raise InputError(
        "The model's logits are not the output of its last linear layer (nor of a 1×1 convolution averaged over the "
        "image). Directions can be erased from such a layer alone; choose another defense."
    )


def _averaged(layer: nn.Conv2d, out: Tensor, logits: Tensor) -> bool:
    """Whether the logits are the layer's output, averaged over the image, and so a linear map of its averaged input."""
    plain = layer.groups == 1 and layer.stride == (1, 1) and layer.padding in ((0, 0), 0)
    fits = plain and out.ndim == 4 and out.shape[:2] == logits.shape
    return fits and torch.allclose(out.mean((2, 3)), logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def features(model: nn.Module, head: Head, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """The head's inputs ``[N, F]`` on images ``[N, C, H, W]``, on the CPU."""
    caught: list[Tensor] = []

    def catch(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        caught[:] = [inputs[0].mean((2, 3)) if head.pooled else inputs[0]]

    hook = model.get_submodule(head.name).register_forward_pre_hook(catch)
    try:
        with evaluating(model), fast(model) as run:

            def asked(part: Tensor) -> Tensor:
                run(part)
                return caught[0].float().cpu()

            return torch.cat(list(halving(asked, images, Chunk(batch_size))))
    finally:
        hook.remove()


@torch.no_grad()
def erase(layer: nn.Linear | nn.Conv2d, natural: Tensor, directions: Tensor) -> None:
    """Take ``directions`` ``[r, F]`` out of a `Head`'s layer, in place.

    Without a bias nothing can be centred: second moments about 0 are used. Worked out in float64 on the CPU.

    Args:
        layer: Changed in place.
        natural: Its inputs on natural images ``[N, F]`` (`smi.erasure.natural` says why not on reconstructions).
        directions: In the space of its inputs.
    """
    weight, kept, d = (part.cpu().double() for part in (layer.weight.flatten(1), natural, directions))
    mean = kept.mean(0) if layer.bias is not None else torch.zeros_like(kept[0])
    centred = kept - mean
    covariance = centred.T @ centred / len(kept)
    ridge = RIDGE * covariance.diagonal().mean()
    covariance.diagonal().add_(ridge)
    solved = torch.linalg.solve(covariance, d.T).T  # D Σ⁻¹
    gram = solved @ d.T
    gram.diagonal().add_(RIDGE_OF_DIRECTIONS * gram.diagonal().mean())
    out = (weight @ d.T) @ torch.linalg.solve(gram, solved)  # W (I − P)
    layer.weight.copy_((weight - out).view(layer.weight.shape).to(layer.weight.dtype))
    if layer.bias is not None:
        layer.bias.copy_((layer.bias.cpu().double() + out @ mean).to(layer.bias.dtype))
