"""Measure on the GPU at hand which way each convolution should take, and write the device's configuration.

    python -m smi_kernels.tune

times our convolution and the vendor's library on the layers of the benchmark's models, in bfloat16, and writes
``configs/<device>.json`` (with the date and versions), which `smi_kernels.configs` reads from then on.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from smi_kernels import configs, ops  # noqa: F401  registers torch.ops.smi_kernels
from smi_kernels.backends.triton import library_conv
from smi_kernels.bench.models import ARCHITECTURES, make_images, make_model
from smi_kernels.layers import zero_padding
from smi_kernels.plan import Layer, plan_of

DRAWS = 8
"""Draws in a group."""


def layers_of(name: str, n: int) -> Iterator[tuple[nn.Conv2d, Tensor]]:
    """Convolutions of a benchmark model, each with a random input ``[N, C, H, W]`` of its size."""
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
        if isinstance(module, nn.Conv2d):
            yield module, torch.randn(n, *shapes[step.module][1:])  # type: ignore[union-attr]


def measure(module: nn.Conv2d, x: Tensor, time: Callable[[Callable[[], Any]], float]) -> dict[str, Any]:
    """Seconds of a convolution by our kernel and by the library, `DRAWS` draws with bias and activation."""
    weight = torch.randn(DRAWS, *module.weight.shape, device=x.device, dtype=x.dtype)
    ours = weight.flatten(3).transpose(2, 3).contiguous()
    theirs = ours.unflatten(2, module.kernel_size).permute(0, 1, 4, 2, 3)
    bias = torch.randn(DRAWS, module.out_channels, device=x.device)
    batch = x.repeat(DRAWS, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    padding = zero_padding(module)
    assert padding is not None
    geometry = (list(module.stride), list(padding), list(module.dilation), module.groups)

    def kernel() -> Tensor:
        end = ("relu", False, x.dtype)
        return torch.ops.smi_kernels.perturbed_conv(
            batch, ours, bias, None, DRAWS, list(module.kernel_size), *geometry, *end
        )

    def library() -> Tensor:
        return library_conv(batch, theirs, bias, None, DRAWS, geometry, "relu", shared=False, out_dtype=x.dtype)

    difference = (kernel().float() - library().float()).abs().max().item()
    return {
        "features": configs.features(x, module.weight, DRAWS, module.groups),
        "kernel_seconds": time(kernel),
        "library_seconds": time(library),
        "difference": difference,
    }


def _time(run: Callable[[], Any]) -> float:
    import triton.testing  # not needed to import this module

    return float(triton.testing.do_bench(run, warmup=25, rep=100, return_mode="median")) / 1e3


@click.command(help=__doc__)
@click.option("--force", is_flag=True, help="Replace the device's configuration.")
def main(force: bool) -> None:
    """Measure, and write the configuration."""
    if not torch.cuda.is_available():
        raise click.UsageError("There is no CUDA device here. A configuration holds measurements of one.")
    device = torch.cuda.get_device_name()
    target = Path(configs.FOLDER) / f"{configs.file_name(device)}.json"
    if target.exists() and not force:
        raise click.UsageError(f"{target} exists. Replace it with --force.")
    rows = []
    for name in ARCHITECTURES:
        for n in (16, 64, 256):
            for module, x in layers_of(name, n):
                row = measure(module, x.to(device="cuda", dtype=torch.bfloat16), _time)
                click.echo(f"{name} N={n} {row['kernel_seconds']:.2e} {row['library_seconds']:.2e}")
                rows.append(row)
    measured = {
        "device": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
    }
    fresh = target.with_suffix(".tmp")
    fresh.write_text(json.dumps({"measured": measured, "convolutions": rows}, indent=1) + "\n")
    fresh.replace(target)
    click.echo(f"Wrote {target}.")


if __name__ == "__main__":
    main()
