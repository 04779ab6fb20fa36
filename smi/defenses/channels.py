"""What channel pruning needs: a model's convolutions, a channel's removal, and a yardstick that is the defender's own.

The published methods choose how much to prune by accuracy on clean data, or even by attack success. Here the yardstick
is `agreement`: the share of held-out samples on which the pruned model still says what the suspect model says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smi.domains.base import Samples
from smi.errors import InputError
from smi.runtime.checks import check_module, device_of, evaluating
from smi.runtime.compute import predict
from smi.runtime.seeding import stream

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Layer:
    """A convolution and the BatchNorm that its output goes to, by their names in the model.

    Attributes:
        conv: The convolution.
        norm: The BatchNorm; None where there is none.
        channels: How many the convolution puts out.
    """

    conv: str
    norm: str | None
    channels: int

    @property
    def output(self) -> str:
        """Name of the module that the channels come out of."""
        return self.conv if self.norm is None else self.norm


def conv_layers(model: nn.Module, images: Tensor | None = None) -> list[Layer]:
    """The convolutions of ``model``, each with its BatchNorm.

    Args:
        model: Images to logits.
        images: ``[N, C, H, W]`` in [0, 1]; one of them is run, which shows in what order the convolutions are used and
            which BatchNorm is fed with which. Without images both are read from the order in which the modules were
            registered.

    Raises:
        InputError: Where there is no convolution.
    """
    check_module(model)
    layers = _registered(model) if images is None else _used(model, images)
    if not layers:
        raise InputError("The model has no convolution, so that there are no channels to prune. Use another defense.")
    return layers


def _registered(model: nn.Module) -> list[Layer]:
    leaves = [(name, m) for name, m in model.named_modules() if not any(m.children())]
    layers = []
    for (name, module), (after, norm) in zip(leaves, [*leaves[1:], ("", None)], strict=True):
        if isinstance(module, CONVOLUTIONS):
            fits = isinstance(norm, NORMS) and norm.num_features == module.out_channels
            layers.append(Layer(name, after if fits else None, module.out_channels))
    return layers


def _used(model: nn.Module, images: Tensor) -> list[Layer]:
    names, norm_of, outputs = {m: name for name, m in model.named_modules()}, {}, {}

    def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, CONVOLUTIONS):
            outputs[module] = output  # kept, so that no later tensor can take its place in memory
            return
        for conv, made in outputs.items():
            if made is args[0]:
                norm_of[conv] = names[module]

    with ExitStack() as hooks, evaluating(model), torch.no_grad():
        for module in names:
            if isinstance(module, CONVOLUTIONS + NORMS):
                hooks.callback(module.register_forward_hook(see).remove)
        model(images[:1].to(device_of(model)))
    return [Layer(names[conv], norm_of.get(conv), conv.out_channels) for conv in outputs]


@torch.no_grad()
def prune(model: nn.Module, layer: Layer, channels: Tensor) -> None:
    """Make ``channels`` (int64 positions or a boolean mask) of ``layer`` zero on every image, in place.

    In a residual network this is the output of the block's BatchNorm; what the shortcut adds to it remains.
    """
    modules = [model.get_submodule(name) for name in (layer.conv, layer.norm) if name is not None]
    for module in modules:
        weight, bias = module.weight, module.bias
        if not isinstance(weight, Tensor):
            raise InputError(f"{layer.norm!r} is a BatchNorm without weights (affine=False); it cannot be pruned.")
        weight[channels] = 0
        if isinstance(bias, Tensor):
            bias[channels] = 0


def activity(model: nn.Module, layer: Layer, images: Tensor) -> Tensor:
    """Mean activation of every channel of ``layer``: float32 ``[channels]``, of the positive part, as after a ReLU."""
    seen: dict[str, Tensor] = {}
    total = torch.zeros(layer.channels)
    with watch(model, [layer.output], seen):
        for batch in images.split(512):
            predict(model, batch)
            out = seen[layer.output].float().clamp(min=0).transpose(0, 1).flatten(1).cpu()
            total += out.mean(1) * len(batch) / len(images)
    return total


@contextmanager
def watch(model: nn.Module, names: list[str], seen: dict[str, Tensor]) -> Iterator[None]:
    """Inside the block each forward pass leaves what the modules of these names put out in ``seen``."""
    with ExitStack() as hooks:
        for name in names:

            def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> None:
                seen[name] = output

            hooks.callback(model.get_submodule(name).register_forward_hook(keep).remove)
        yield


def split(samples: Samples, held: float, seed: int) -> tuple[Samples, Samples]:
    """Two disjoint parts, in random order: what to fit to, and a share ``held`` in (0, 1) to measure agreement on."""
    if len(samples) < 2:
        raise InputError("One sample cannot be split into one part to fit to and one to measure on. Pass more samples.")
    order = torch.randperm(len(samples), generator=stream(seed, "held out"))
    count = min(len(samples) - 1, max(1, round(held * len(samples))))
    return samples.select(order[count:]), samples.select(order[:count])


def agreement(model: nn.Module, suspect: nn.Module | Tensor, images: Tensor) -> float:
    """Share in [0, 1] of ``images`` on which two models say the same; the second may be given by its labels ``[N]``."""
    labels = suspect if isinstance(suspect, Tensor) else predict(suspect, images).argmax(1)
    return (predict(model, images).argmax(1) == labels).float().mean().item()


def pruned_share(pruned: Mapping[str, list[int]], layers: list[Layer]) -> float:
    """Share in [0, 1] of all channels of ``layers`` that are pruned."""
    return sum(len(v) for v in pruned.values()) / sum(layer.channels for layer in layers)
