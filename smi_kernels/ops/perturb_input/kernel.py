"""Perturbed images for a chunk of draws, clamped, cast and laid out channels last, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smi_kernels.errors import InputError
from smi_kernels.noise import INDEPENDENT, INPUT, Family
from smi_kernels.noise.triton import counter_noise
from smi_kernels.ops import launch
from smi_kernels.ops.launch import Draws


def perturb_input(
    images: Tensor,
    *,
    sigma: float,
    family: Family,
    which: Draws,
    dtype: torch.dtype = torch.float32,
    block: int = 1024,
    images_per_program: int = 16,
    num_warps: int = 4,
) -> Tensor:
    """clamp(x + σ·δ_j, 0, 1) for several draws j, with one δ_j for all images.

    Equal to torch's ``(images + sigma * noise).clamp(0, 1)`` in float32, bit for bit, and then one cast; the noise is
    `smi_kernels.noise.draw` of the shape ``[C, H, W]``, stream ``INPUT``, tensor 0.

    Args:
        images: float32 ``[N, C, H, W]``, contiguous, in [0, 1].
        sigma: standard deviation ≥ 0 in pixel units.
        family: the noise family; it must have a Triton twin and independent elements.
        which: the draws.
        dtype: of the result: bfloat16, float16 or float32.
        block: elements of an image in one program, a power of two. Changes no bit.
        images_per_program: that share the noise once it is drawn. Changes no bit.
        num_warps: of one program. Changes no bit.

    Returns:
        ``[draws · N, C, H, W]``, draw by draw, in the memory format channels_last.

    Raises:
        InputError: for images or a family that cannot be used.
    """
    twin = launch.family_kernel(family)
    _check(images, dtype, family)
    programs, first_number, signs = which.grid()
    n, channels, height, width = images.shape
    pixels = height * width
    channels_padded = launch.next_power_of_two(channels)
    span = max(128, block // channels_padded)
    aligned = pixels % family.elements == 0
    tiles = triton.cdiv(pixels + (0 if aligned else family.elements - 1), span)
    group = min(images_per_program, launch.next_power_of_two(n))
    out = torch.empty(which.count, n, height, width, channels, dtype=dtype, device=images.device)
    with launch.on_device(images), launch.writable(out) as target:
        _perturb_input[(tiles * triton.cdiv(n, group), programs)](
            images, target, n, pixels, tiles, float(sigma), which.first, first_number, which.count,
            *launch.key_words(which.seed), FAMILY=twin, ELEMENTS=family.elements, SIGNS=signs, STREAM=INPUT,
            ALIGNED=aligned, CHANNELS=channels, CHANNELS_PADDED=channels_padded, SPAN=span, IMAGES=group,
            num_warps=num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out.view(which.count * n, height, width, channels).permute(0, 3, 1, 2)


def _check(images: Tensor, dtype: torch.dtype, family: Family) -> None:
    launch.check_tensors(images=images)
    launch.check_dtype("images", images, torch.float32)
    if images.ndim != 4 or not images.numel() or images[0].numel() >= 1 << 30:
        raise InputError(
            f"images have shape {list(images.shape)}. Allowed: [N, C, H, W], not empty, below 2³⁰ values an image."
        )
    if family.structure != INDEPENDENT:
        raise InputError(f"The noise family is {family.structure}. Allowed on images: {INDEPENDENT} elements.")
    if dtype not in (*launch.LOW_PRECISION, torch.float32):
        raise InputError(f"dtype is {dtype}. Allowed: torch.bfloat16, torch.float16, torch.float32.")


@triton.jit(do_not_specialize=["n", "tiles", "first", "first_number", "draws", "key_low", "key_high"])
def _perturb_input(
    images: tl.tensor, out: tl.tensor, n: tl.tensor, pixels: tl.tensor, tiles: tl.tensor, sigma: tl.tensor,
    first: tl.tensor, first_number: tl.tensor, draws: tl.tensor, key_low: tl.tensor, key_high: tl.tensor,
    FAMILY: tl.constexpr, ELEMENTS: tl.constexpr, SIGNS: tl.constexpr, STREAM: tl.constexpr, ALIGNED: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_PADDED: tl.constexpr, SPAN: tl.constexpr, IMAGES: tl.constexpr,
) -> None:  # fmt: skip
    tile, group = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    number = first_number + tl.program_id(1)
    channel = tl.arange(0, CHANNELS_PADDED)[:, None]
    # Each channel begins in the middle of a counter, unless aligned: its pixels are shifted by what lies before.
    index = channel * pixels // ELEMENTS + tile * (SPAN // ELEMENTS) + tl.arange(0, SPAN // ELEMENTS)[None, :]
    noise = counter_noise(FAMILY, ELEMENTS, key_low, key_high, index, 0, number, STREAM)
    pixel = tile * SPAN + tl.arange(0, SPAN)[None, :]
    if not ALIGNED:
        pixel -= channel * pixels % ELEMENTS
    exists = (pixel >= 0) & (pixel < pixels) & (channel < CHANNELS)

    size = tl.cast(pixels, tl.int64) * CHANNELS
    for i in range(IMAGES):
        image = group * IMAGES + i
        if image < n:
            x = tl.load(images + image * size + channel * pixels + pixel, exists, other=0.0)
            for s in tl.static_range(SIGNS):
                draw = number * SIGNS + s - first
                if (draw >= 0) & (draw < draws):
                    value = x + sigma * (noise if s == 0 else -1.0 * noise)
                    value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
                    value = tl.minimum(value, 1.0, propagate_nan=tl.PropagateNan.ALL)
                    place = (draw.to(tl.int64) * n + image) * size + pixel * CHANNELS + channel
                    tl.store(out + place, value.to(out.dtype.element_ty), exists)
