"""What is asked of a backend, checked once before any work is done."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smi_kernels.divergences import Divergence
from smi_kernels.errors import InputError
from smi_kernels.noise import Family
from smi_kernels.noise.perturbed_model import ParameterFilter


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One call of `stability_scores`, with names resolved; see there for the meaning of each field.

    Raises:
        InputError: on construction, for images, labels or numbers that cannot be used.
    """

    images: Tensor
    labels: Tensor | None
    k: int
    sigma_x: float
    sigma_w: float
    family: Family
    input_family: Family
    divergence: Divergence
    antithetic: bool
    seed: int
    dtype: torch.dtype
    chunk: int
    reduce: str
    parameters: ParameterFilter

    def __post_init__(self) -> None:
        check_images(self.images)
        _check_draws(self.k, self.antithetic)
        _check_integer("seed", self.seed, 0, 2**64 - 1)
        _check_integer("chunk", self.chunk, 1, None)
        _check_sigma("sigma_x", self.sigma_x, "pixel units, such as 0.1")
        _check_sigma("sigma_w", self.sigma_w, "units of each tensor's root mean square, such as 0.05")
        self._check_labels()

    def _check_labels(self) -> None:
        n, labels = len(self.images), self.labels
        if labels is None:
            if self.divergence.needs_labels:
                raise InputError(
                    "This divergence needs labels, but none were given. Pass labels [N] of integers, or the model's "
                    "own predictions: model(images).argmax(1)."
                )
            return
        if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise InputError(f"The labels are {_kind(labels)}. Allowed: an integer tensor [N]. Try labels.long().")
        if labels.shape != (n,):
            raise InputError(f"The labels have shape {tuple(labels.shape)}. Allowed: ({n},), one label for each image.")
        if labels.device != self.images.device:
            raise InputError(
                f"The labels are on {labels.device} and the images on {self.images.device}. Both must be on one "
                "device: labels.to(images.device)."
            )

    @property
    def working_dtype(self) -> torch.dtype:
        """Of parameters, logits and divergence: float64 if that was asked for, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def check_images(images: Tensor) -> None:
    """Raise `InputError` unless images are a floating-point tensor ``[N, C, H, W]`` with values in [0, 1]."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise InputError(
            f"The images are {_kind(images)}. Allowed: a floating-point tensor [N, C, H, W] in [0, 1]. "
            "For bytes, try images.float() / 255."
        )
    if images.ndim != 4 or 0 in images.shape:
        hint = " For a single image, try images[None]." if images.ndim == 3 else ""
        raise InputError(f"The images have shape {tuple(images.shape)}. Allowed: [N, C, H, W], none of them 0.{hint}")
    low, high = (v.item() for v in torch.aminmax(images.detach()))
    if math.isnan(low) or math.isnan(high):
        raise InputError("The images hold NaN. Allowed: values in [0, 1]. See where they come from.")
    if low < 0 or high > 1:
        raise InputError(
            f"The images hold values from {low:.4g} to {high:.4g}. Allowed: [0, 1]. Undo any normalisation (it belongs "
            "inside the model), or try images.clamp(0, 1)."
        )


def check_model(model: nn.Module, images: Tensor) -> None:
    """Raise `InputError` unless a model is a module, all in eval mode, on the images' device."""
    if not isinstance(model, nn.Module):
        raise InputError(f"The model is {_kind(model)}. Allowed: a torch.nn.Module.")
    training = next((name or "the model itself" for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise InputError(
            f"The model is in train mode ({training}), where BatchNorm and dropout make a score depend on the batch "
            "and on chance. Allowed: eval mode throughout. Try model.eval()."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != images.device:
            raise InputError(
                f"The images are on {images.device} and the model's {name} on {tensor.device}. Both must be on one "
                "device: images.to(device), model.to(device)."
            )


def check_logits(logits: Tensor, request: Request, n: int, *, perturbed: bool) -> None:
    """Raise `InputError` unless a model's output for n images is finite logits ``[n, C ≥ 2]`` that fit the labels."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != n or logits.shape[1] < 2:
        shape = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else _kind(logits)
        raise InputError(f"The model's output has {shape} for {n} images. Allowed: logits [{n}, C] with C ≥ 2 classes.")
    if not logits.isfinite().all():
        where = "under noise" if perturbed else "without any noise"
        remedy = "a smaller sigma_w or sigma_x" if perturbed else "to find the layer whose weights or output are not"
        raise InputError(f"The model's logits {where} hold NaN or infinity. Allowed: finite logits. Try {remedy}.")
    if request.labels is not None and not perturbed:
        low, high = (v.item() for v in torch.aminmax(request.labels))
        if low < 0 or high >= logits.shape[1]:
            raise InputError(
                f"The labels run from {low} to {high}. Allowed: 0 to {logits.shape[1] - 1}, the classes of the model."
            )


def _check_draws(k: int, antithetic: bool) -> None:
    _check_integer("k", k, 1, 2**32 - 1)
    if antithetic and k % 2:
        raise InputError(f"k is {k}, but antithetic draws come in pairs (+E, −E). Allowed: an even k. Try k={k + 1}.")


def _check_integer(name: str, value: int, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name} is {value!r}. Allowed: an integer {bound}.")


def _check_sigma(name: str, value: float, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(f"{name} is {value!r}. Allowed: a finite number, 0 or larger, in {unit}.")


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
