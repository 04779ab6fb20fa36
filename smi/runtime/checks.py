"""Checks of what callers pass in. Each raises `InputError` before any work is done."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smi.errors import InputError


def check_images(images: object, what: str = "images") -> None:
    """``images`` must be float ``[N, C, H, W]``, N > 0, C 1 or 3, finite and in [0, 1]."""
    if not isinstance(images, Tensor):
        raise InputError(f"{what} must be a torch.Tensor, not {type(images).__name__}. Try torch.as_tensor(...).")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(
            f"{what} have shape {tuple(images.shape)}. Allowed: [N, C, H, W] with C = 1 or 3. "
            "Try images.permute(0, 3, 1, 2) for channels-last, or images[None] for a single image."
        )
    if images.numel() == 0:
        raise InputError(f"{what} are empty. At least one image is needed.")
    if not images.is_floating_point():
        raise InputError(f"{what} are {images.dtype}. Allowed: float in [0, 1]. Try images.float() / 255.")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise InputError(
            f"{what} have values from {low.item():.4g} to {high.item():.4g}. Allowed: finite values in [0, 1]. "
            "Try images / 255, or undo the normalisation: it belongs inside the model (smi.Classifier)."
        )


def check_labels(labels: object, n: int, num_classes: int, what: str = "labels") -> None:
    """``labels`` must be int64 ``[n]`` with values in ``[0, num_classes)``."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (n,):
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise InputError(f"{what} are {got}. Allowed: an int64 tensor of shape [{n}], one label an image.")
    low, high = labels.aminmax()
    if low < 0 or high >= num_classes:
        raise InputError(
            f"{what} run from {low.item()} to {high.item()}, but there are {num_classes} classes. "
            f"Allowed: 0 to {num_classes - 1}. Check that the labels and the class count belong together."
        )


def check_model(model: object, images: Tensor, num_classes: int | None = None) -> int:
    """``model`` must map ``images`` to finite logits ``[N, classes]`` and have finite weights. Returns the class count.

    One forward pass of one image is made, in eval mode; the model is left as it was.
    """
    check_module(model)
    assert isinstance(model, nn.Module)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError(f"The model's {name!r} has NaN or infinite values. Load an intact checkpoint.")
    trained_on = getattr(model, "image_shape", None)  # pooling lets a model run on any size, sense or not
    if trained_on is not None and tuple(images.shape[1:]) != tuple(trained_on):
        raise InputError(
            f"The model was trained on images of shape {tuple(trained_on)}, not {tuple(images.shape[1:])}. "
            "Use images or a prior of the size and channels that the model was trained on."
        )
    try:
        with evaluating(model), torch.no_grad():
            logits = model(images[:1].to(device_of(model)))
    except Exception as error:  # a model may check its input with an assert or in any other way
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"The model does not accept images of shape {tuple(images.shape[1:])}: {reason}. "
            "Use images or a prior of the size and channels that the model was trained on."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not torch.isfinite(logits).all():
        raise InputError("The model must return one finite tensor of logits [N, classes].")
    if num_classes is not None and logits.shape[1] != num_classes:
        raise InputError(
            f"The model has {logits.shape[1]} classes, but {num_classes} were expected. "
            "Check that the model and the data or samples belong together."
        )
    return logits.shape[1]


def check_module(model: object) -> None:
    """``model`` must be a `torch.nn.Module`."""
    if not isinstance(model, nn.Module):
        raise InputError(f"The model is a {type(model).__name__}. Allowed: a torch.nn.Module from images to logits.")


def check_number(
    name: str, value: float, *, low: float = -math.inf, high: float = math.inf, integer: bool = False
) -> None:
    """``value`` must be a finite number in ``[low, high]``."""
    kind = "a whole number" if integer else "a number"
    good = isinstance(value, int) if integer else isinstance(value, (int, float))
    if not good or isinstance(value, bool) or not math.isfinite(value) or not low <= value <= high:
        upper = f" to {high:g}" if math.isfinite(high) else " or more"
        raise InputError(f"{name} is {value!r}. Allowed: {kind} from {low:g}{upper}.")


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (cpu where it has none)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode inside the block (BatchNorm statistics frozen, no dropout); every module's mode is restored after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode
