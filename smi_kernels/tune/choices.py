"""What measurements on a GPU choose: the tile of each convolution, and whether the vendor's library is faster.

`configs/default.json` is what is used on a device that has no file of its own: nothing was measured. ``python -m
smi_kernels.tune`` measures the device at hand and writes a file for it.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smi_kernels.ops.perturbed_conv.shape import ConvShape

FOLDER = Path(__file__).parent / "configs"

HALF, SIGNS = "half", "half, signs"
"""Kinds of convolution that are measured: perturbed weights in 16 bits, and Rademacher signs expanded in the tile."""


@functools.cache
def load(device: str) -> dict[str, Any]:
    """The configuration of a device, by its name as CUDA gives it; the default where there is none."""
    path = FOLDER / f"{file_name(device)}.json"
    return dict(json.loads((path if path.exists() else FOLDER / "default.json").read_text()))


def file_name(device: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def features(shape: ConvShape) -> dict[str, float]:
    """What the choice depends on, as logarithms.

    A draw's images, channels in and out of a group, pixels of a result and taps. Not the draws, so that cutting them
    into groups changes no bit.
    """
    sizes = {
        "images": shape.images,
        "channels": shape.channels,
        "outputs": shape.outputs // shape.groups,
        "pixels": shape.result[0] * shape.result[1],
        "taps": shape.taps,
    }
    return {name: math.log2(size) for name, size in sizes.items()}


@functools.lru_cache(4096)
def nearest(device: str, shape: ConvShape, kind: str) -> dict[str, Any] | None:
    """The measured row of this kind whose `features` are nearest (Euclidean distance); None if there is none."""
    rows = [row for row in load(device)["convolutions"] if row["kind"] == kind]
    own = features(shape)
    return min(rows, key=lambda row: sum((row["features"][key] - own[key]) ** 2 for key in own), default=None)


def _name(device: torch.device) -> str:
    there = device.type == "cuda" and torch.cuda.is_available()  # fake tensors say cuda where there is none
    return torch.cuda.get_device_name(device) if there else "default"


def tuned_tile(device: torch.device, shape: ConvShape, kind: str) -> dict[str, int] | None:
    """The fastest tile of the nearest measured shape; None where nothing was measured."""
    row = nearest(_name(device), shape, kind)
    return None if row is None else dict(row["tile"])


def prefers_scratch(device: torch.device, shape: ConvShape) -> bool:
    """Whether Rademacher noise is written out and then multiplied faster than its signs are expanded in the product."""
    signs, half = (nearest(_name(device), shape, kind) for kind in (SIGNS, HALF))
    if signs is None or half is None or "perturb_seconds" not in signs:
        return False
    return bool(half["seconds"] + signs["perturb_seconds"] < signs["seconds"])


def fits_kernel(module: nn.Module) -> bool:
    """Whether our convolution can run a layer: it keeps one bit for each row and column of taps in 32 bits."""
    return not isinstance(module, nn.Conv2d) or max(module.kernel_size) <= 32


def prefers_library(device: torch.device, shape: ConvShape) -> bool:
    """Whether the vendor's library is expected to be faster for a convolution than our kernel.

    Groups of few channels always go to the library: ours multiplies blocks of 16 at least. For others the nearest
    measured shape decides, and ours where nothing was measured.
    """
    if shape.groups > 1 and shape.channels < 16:
        return True
    row = nearest(_name(device), shape, HALF)
    return row is not None and bool(row["library_seconds"] < row["seconds"])
