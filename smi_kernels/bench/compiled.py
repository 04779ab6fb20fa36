"""The compiled peer's parts: one draw as one graph, and an unperturbed forward pass that is as fast as it gets."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_eval

from smi_kernels.bench.grouped import grouped_logits
from smi_kernels.bench.models import Normalised
from smi_kernels.bench.problem import Problem
from smi_kernels.divergences import kl

Module = TypeVar("Module", bound=nn.Module)


def compile_module(module: Module, device: torch.device, *, constant: bool = False) -> Module:
    """Compile for one input shape, with a CUDA graph on a GPU. ``constant``: the weights never change.

    On a CPU noise comes from torch's own generator, called by the graph: inductor's is vectorised on a GPU, but takes
    21 ns for a normal on two cores where torch's takes 4 on one.
    """
    torch._dynamo.config.recompile_limit = 64  # beyond it a function silently runs uncompiled
    if device.type == "cuda":
        compiled = torch.compile(module, dynamic=False, mode="reduce-overhead")
    else:
        compiled = torch.compile(module, dynamic=False, options={"fallback_random": True, "freezing": constant})
    return compiled  # type: ignore[return-value]


def next_graph(device: torch.device) -> None:
    """Say that outputs of earlier CUDA graphs are not needed any more."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()


class Step(nn.Module):
    """One draw: images and clean logits to divergences ``[N]``.

    The body is one of

    - ``autocast``: parameters stay float32, torch chooses the format of each operation;
    - ``cast``: perturbed in float32, then cast, and the whole body runs in bfloat16;
    - ``folded``: perturbed and BatchNorm folded in float32, then cast; the last layer in float32.
    """

    def __init__(self, problem: Problem, body: str) -> None:
        super().__init__()
        self.net = _copy(problem.model)
        self.std, self.sigma_x, self.low, self.body = problem.std, problem.sigma_x, problem.low, body
        self.shell = _copy(problem.model).to(problem.low) if body == "cast" else self.net

    @staticmethod
    def bodies(low: torch.dtype) -> list[str]:
        """What can be chosen; casts only matter where the fast format is not float32."""
        return ["autocast", "cast", "folded"] if low == torch.bfloat16 else ["autocast", "folded"]

    def forward(self, images: Tensor, clean: Tensor, given: dict[str, Tensor] | None = None) -> Tensor:
        """``given``: unit noise by name, "" for the image; None draws it here."""
        delta = torch.randn_like(images[0]) if given is None else given[""]
        state = {}
        for name, p in self.net.named_parameters():
            # Not randn_like: for channels_last weights torch's generator on a CPU is then several times slower.
            noise = torch.randn(p.shape, device=p.device) if given is None else given[name]
            state[name] = p + self.std[name] * noise
        x = (images + self.sigma_x * delta).clamp(0, 1)
        return kl(clean, self._logits(state, x))

    def _logits(self, state: dict[str, Tensor], x: Tensor) -> Tensor:
        if self.body == "folded":
            stacked = {name: value[None] for name, value in state.items()}
            return grouped_logits(self.net, stacked, x[None], self.low)[0]
        if self.body == "cast":
            state = {name: value.to(self.low) for name, value in state.items()}
            return functional_call(self.shell, state, (x.to(self.low),)).float()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.low == torch.bfloat16):
            return functional_call(self.net, state, (x,)).float()


class FastForward(nn.Module):
    """The unperturbed model: BatchNorm folded once, channels_last, body in the fast format, float32 logits."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        net = _copy(problem.model)
        for sequential in [m for m in net.modules() if isinstance(m, nn.Sequential)]:
            for i, layer in enumerate(sequential):
                if isinstance(layer, nn.Conv2d):
                    norm = sequential[i + 1]
                    assert isinstance(norm, nn.BatchNorm2d)
                    sequential[i], sequential[i + 1] = fuse_conv_bn_eval(layer, norm), nn.Identity()
        self.mean, self.std, self.last = net.mean, net.std, net.body[-1]
        self.body, self.low = net.body[:-1].to(problem.low), problem.low

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits."""
        return self.last(self.body(((images - self.mean) / self.std).to(self.low)).float())


def _copy(model: Normalised) -> Normalised:
    return copy.deepcopy(model).requires_grad_(False).to(memory_format=torch.channels_last)
