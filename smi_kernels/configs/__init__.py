"""Which way a convolution takes on a GPU: our kernel or the vendor's library, by a small table of measurements.

`default.json` is what is used on a device that has no file of its own; its `measured` says on what it was measured,
if it was at all. ``python -m smi_kernels.tune`` measures the device at hand and writes a file for it.
"""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent


@functools.cache
def load(device: str) -> dict[str, Any]:
    """The configuration of a device, by its name as CUDA gives it; the default where there is none."""
    path = FOLDER / f"{file_name(device)}.json"
    return dict(json.loads((path if path.exists() else FOLDER / "default.json").read_text()))


def file_name(device: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def features(x: Tensor, weight: Tensor, draws: int, groups: int) -> dict[str, float]:
    """What the choice depends on: the logarithms of images, channels in and out of a group, pixels and taps."""
    n = x.shape[0]
    return {
        "images": math.log2(n),
        "channels": math.log2(weight.shape[1]),
        "outputs": math.log2(weight.shape[0] // groups),
        "pixels": math.log2(x.shape[2] * x.shape[3]),
        "taps": math.log2(weight[0, 0].numel()),
        "draws": math.log2(draws),
    }


def fits_kernel(module: nn.Module) -> bool:
    """Whether our convolution can run a layer: it keeps one bit for each row and column of taps in 32 bits."""
    return not isinstance(module, nn.Conv2d) or max(module.kernel_size) <= 32


def prefers_library(x: Tensor, weight: Tensor, draws: int, module: nn.Module) -> bool:
    """Whether the vendor's library is expected to be faster for a layer than our convolution.

    Groups of few channels always go to the library: ours multiplies blocks of 16 at least. For others the
    nearest measured shape decides (Euclidean distance of `features`), and ours where nothing was measured.

    Args:
        x: input ``[draws·N or N, C, H, W]``.
        weight: unperturbed weight ``[O, C / groups, KH, KW]``.
        draws: draws in the group.
        module: the `nn.Conv2d`.
    """
    assert isinstance(module, nn.Conv2d)
    if (module.groups > 1 and weight.shape[1] < 16) or not fits_kernel(module):
        return True
    name = torch.cuda.get_device_name(x.device) if x.is_cuda else "default"
    table = load(name)["convolutions"]
    if not table:
        return False
    own = features(x, weight, draws, module.groups)
    nearest = min(table, key=lambda row: sum((row["features"][key] - own[key]) ** 2 for key in own))
    return bool(nearest["library_seconds"] < nearest["kernel_seconds"])
