"""Times of the benchmark's convolutions, by our kernel with each tile and by the vendor's library."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from smi_kernels import ops  # noqa: F401  registers torch.ops.smi_kernels
from smi_kernels.backends.triton import library_conv
from smi_kernels.bench.models import ARCHITECTURES, make_images, make_model
from smi_kernels.epilogues import epilogues
from smi_kernels.graph.layers import zero_padding
from smi_kernels.graph.plan import Layer, plan_of
from smi_kernels.ops.perturbed_conv.shape import ConvShape, conv_shape, geometry
from smi_kernels.tune.choices import HALF, SIGNS, features

DRAWS = 8
"""Draws in a group."""

IMAGES = (16, 64, 256)
"""Images of a draw."""

# block_m, block_o, block_k, num_warps, num_stages, weight_first
TILES: dict[str, list[tuple[int, int, int, int, int, int]]] = {
    HALF: [
        (64, 32, 32, 4, 3, 0), (128, 32, 64, 4, 3, 0), (256, 32, 64, 8, 3, 0),
        (64, 64, 64, 4, 4, 0), (128, 64, 64, 4, 3, 0), (128, 64, 64, 8, 3, 0), (256, 64, 64, 8, 3, 0),
        (64, 128, 64, 4, 3, 0), (128, 128, 64, 8, 3, 0), (128, 128, 64, 4, 3, 0), (256, 128, 64, 8, 3, 0),
        (128, 256, 64, 8, 3, 0),
    ],
    SIGNS: [
        (64, 32, 32, 4, 3, 0), (256, 32, 64, 8, 3, 0), (64, 64, 64, 4, 3, 0), (128, 64, 64, 4, 3, 0),
        (256, 64, 64, 8, 3, 0), (128, 128, 64, 8, 3, 0), (256, 64, 64, 8, 3, 1), (128, 128, 64, 8, 3, 1),
    ],
}  # fmt: skip
"""What is tried, by kind of convolution."""

NAMES = ("block_m", "block_o", "block_k", "num_warps", "num_stages", "weight_first")


def layers_of(name: str) -> Iterator[tuple[nn.Conv2d, tuple[int, int, int]]]:
    """Convolutions of a benchmark model, each with the shape ``(C, H, W)`` of its inputs."""
    model, images = make_model(name).eval(), make_images(name, 2)
    shapes: dict[str, torch.Size] = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, __, key=key: shapes.update({key: inputs[0].shape}))
        for key, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad():
        model(images[:1])
    for hook in hooks:
        hook.remove()
    for step, _ in plan_of(model, images).steps:
        module = model.get_submodule(step.module) if isinstance(step, Layer) else None
        if isinstance(step, Layer) and isinstance(module, nn.Conv2d):
            _, c, h, w = shapes[step.module]
            yield module, (c, h, w)


class Problem:
    """A convolution of `DRAWS` draws with random numbers, bias and ReLU, in bfloat16."""

    def __init__(self, module: nn.Conv2d, size: tuple[int, int, int], images: int, device: str) -> None:
        padding = zero_padding(module)
        assert padding is not None
        self.module, rows = module, module.out_channels
        self.geometry = geometry(module.kernel_size, module.stride, padding, module.dilation, module.groups)
        self.x = torch.randn(DRAWS * images, *size, device=device, dtype=torch.bfloat16)
        self.x = self.x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(DRAWS, *module.weight.shape, device=device, dtype=torch.bfloat16)
        self.weight = weight.flatten(3).transpose(2, 3).contiguous()
        self.theta, self.bias = weight[0].float(), torch.randn(DRAWS, rows, device=device)
        words = -(-module.weight.shape[1] // 32)
        bits = (DRAWS, rows, module.weight[0, 0].numel(), words)
        self.signs = torch.randint(-(2**31), 2**31 - 1, bits, device=device, dtype=torch.int32)
        self.shape = conv_shape(self.x, self.weight.shape[1:], DRAWS, self.geometry, shared=False)

    def ours(self, kind: str, tile: dict[str, int] | None) -> Tensor:
        """By our kernel; with the tile that it chooses itself where none is given."""
        from smi_kernels.ops.perturbed_conv.kernel import Packed, perturbed_conv

        packed = None if kind == HALF else Packed(self.signs, 0.1)
        weight = self.weight if kind == HALF else self.weight[0].contiguous()
        return perturbed_conv(
            self.x, weight, self.bias, draws=DRAWS, geometry=self.geometry, epilogue=epilogues["relu"], packed=packed,
            tile=tile,
        )  # fmt: skip

    def perturb(self) -> Tensor:
        """Weights with Rademacher noise written out, which `HALF` then multiplies, instead of `SIGNS`."""
        out = torch.empty_like(self.weight)
        torch.ops.smi_kernels.perturb_weight(
            self.theta, out, 0.1, None, 1, "rademacher", 0, DRAWS, 1, 2, False, None, None
        )
        return out

    def library(self) -> Tensor:
        """By the vendor's library."""
        weight = self.weight.unflatten(2, self.module.kernel_size).permute(0, 1, 4, 2, 3)
        return library_conv(
            self.x, weight, self.bias, None, draws=DRAWS, geometry=self.geometry, epilogue=epilogues["relu"],
            shared=False, out_dtype=self.x.dtype,
        )  # fmt: skip


def tiles_for(kind: str, shape: ConvShape) -> Iterator[dict[str, int]]:
    """Those of `TILES` that do not mostly multiply zeros."""
    length = shape.channels * (shape.taps if shape.taps > 1 and shape.channels <= 16 else 1)
    seen = set()
    for tile in TILES[kind]:
        block_k = min(tile[2], max(16, 1 << math.ceil(math.log2(length))))
        clipped = (*tile[:2], block_k, *tile[3:])
        if tile[1] <= max(32, shape.outputs // shape.groups) and clipped not in seen:
            seen.add(clipped)
            yield dict(zip(NAMES, clipped, strict=True))


def problems(images: tuple[int, ...] = IMAGES) -> Iterator[tuple[str, nn.Conv2d, tuple[int, int, int], int]]:
    """Name, layer, shape of its inputs and images of a draw, for the layers of all models, each shape once."""
    seen = set()
    for n in images:
        for name in ARCHITECTURES:
            for module, size in layers_of(name):
                key = (n, size, module.weight.shape, module.stride, module.padding, module.groups)
                if key not in seen:
                    seen.add(key)
                    yield name, module, size, n


def measure(problem: Problem, kind: str) -> dict[str, Any]:
    """A row of the configuration: the fastest tile of one kind and its seconds, and what else there is to choose.

    That is for `HALF` the library, for `SIGNS` the same noise written out (`perturb_seconds`) for `HALF`.
    """
    tiles = list(tiles_for(kind, problem.shape))
    times = [_time(partial(problem.ours, kind, tile)) for tile in tiles]
    best = times.index(min(times))
    row = {
        "kind": kind,
        "features": {name: round(value, 4) for name, value in features(problem.shape).items()},
        "tile": tiles[best],
        "seconds": times[best],
    }
    if kind == HALF:
        row["library_seconds"] = _time(problem.library)
        row["difference"] = (problem.ours(kind, tiles[best]).float() - problem.library().float()).abs().max().item()
    else:
        row["perturb_seconds"] = _time(problem.perturb)
    return row


def _time(run: Any) -> float:
    import triton.testing  # not needed to import this module

    # As a graph, so that what is measured is the device and not how fast Python launches small kernels.
    return float(triton.testing.do_bench_cudagraph(run, rep=1, return_mode="median")) / 1e3


def compile_one(index: int) -> None:
    """Compile every tile for one of the shapes, in a process of its own; the results stay in Triton's cache."""
    _, module, size, n = list(problems(IMAGES[:1]))[index]
    problem = Problem(module, size, n, "cuda")
    for kind in TILES:
        for tile in tiles_for(kind, problem.shape):
            problem.ours(kind, tile)
    torch.cuda.synchronize()


def compile_all(jobs: int) -> None:
    """Compile what `measure` runs, on several processors."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, range(len(list(problems(IMAGES[:1]))))))
